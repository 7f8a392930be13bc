"""Over- and under-refusal by hand: prompts, references and answers as vectors in a plane."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.probe.refusal as refusal
from pipeline.core.bootstrap import BootstrapParams
from pipeline.core.errors import EvaluationError
from pipeline.probe.base import ProbeContext
from pipeline.probe.refusal import RefusalParams, RefusalTexts, auroc, load_refusal_texts, refusal_deltas, run, wins
from pipeline.probe.sources import load_rows
from tests.conftest import ROOT
from tests.evaluate.fakes import VectorSystem, write_folder
from tests.probe import fakes

TEXTS = RefusalTexts(openings=["i cannot"], phrases=["not appropriate"], refusals=["no", "never"], compliance=["yes"])
PROMPTS = [("s1", "safe"), ("s2", "safe"), ("s3", "safe"), ("u1", "unsafe"), ("u2", "unsafe")]
ANSWERS = {"s1": "help one", "s2": "I cannot.", "s3": "help three", "u1": "I cannot!", "u2": "help two"}
REFERENCES = {"no": [0, 1], "never": [0, 2], "yes": [1, 0], **{text: [1, 0.1] for text in ANSWERS.values()}}
# s3 is over-refused and u1 under-refused; s2 lies near the refusals too, but the backbone refused it.
STUDENT = {"s1": [1, 0], "s2": [0, 1], "s3": [0.1, 1], "u1": [1, 0.5], "u2": [0.2, 1]}


def context(folder: Path, *systems: Any, answers: dict[str, str] = ANSWERS) -> ProbeContext:
    """A probe's context with the prompts in `folder` and given answers."""
    rows = [{"id": f"i{n}", "prompt": prompt, "type": "t", "label": label} for n, (prompt, label) in enumerate(PROMPTS)]
    write_folder(folder / "prompts", {"default": {"test": rows}})

    return fakes.context(folder, *systems, answers=answers)


@pytest.fixture(autouse=True)
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three reference texts in place of the shipped ones."""
    monkeypatch.setattr(refusal, "load_refusal_texts", lambda: TEXTS)


def plane(name: str, prompts: dict[str, Sequence[float]]) -> VectorSystem:
    """Prompts as given, references and answers always in the same places."""
    return VectorSystem({**REFERENCES, **prompts}, name)


def test_the_rates_by_hand(tmp_path: Path) -> None:
    result = run(
        RefusalParams(local="prompts"), context(tmp_path, plane("student", STUDENT), plane("teacher", STUDENT))
    )
    expected = {
        "safe": 3, "safe_answered": 2, "safe_without_answer": 0, "unsafe": 2, "unsafe_answered": 1,
        "backbone/refused_safe": round(1 / 3, 6), "backbone/refused_unsafe": 0.5,
        "student/over_refusal": 0.5, "student/under_refusal": 0.5,
        # scores rise from s1 over u1, u2 and s3 to s2: of six pairs two are in order
        "student/auroc": round(2 / 6, 6),
    }  # fmt: skip
    assert expected.items() <= result.metrics.items()
    rows = {row["prompt"]: row for row in result.rows.to_pylist() if row["system"] == "student"}
    assert [rows[prompt]["wrong"] for prompt, _ in PROMPTS] == [False, None, True, True, False]
    assert [rows[prompt]["answer_class"] for prompt, _ in PROMPTS] == [
        "complied", "refused", "complied", "refused", "complied",
    ]  # fmt: skip
    s3 = rows["s3"]
    assert (s3["id"], s3["system"], s3["label"], s3["answer"]) == ("i2", "student", "safe", "help three")
    length = np.hypot(0.1, 1)
    np.testing.assert_allclose(s3["nearest_refusal"], 1 / length, rtol=1e-6)
    np.testing.assert_allclose(s3["own_answer"], (0.1 + 0.1) / length / np.hypot(1, 0.1), rtol=1e-6)
    np.testing.assert_allclose(s3["score"], (1 - 0.1) / length, rtol=1e-6)


def test_a_perfect_system_and_one_that_says_nothing(tmp_path: Path) -> None:
    perfect = {"s1": [1, 0], "s2": [1, 0], "s3": [1, 0], "u1": [0, 1], "u2": [0, 1]}
    constant = {text: [1, 1] for text in (*REFERENCES, *perfect)}
    systems = [plane("student", perfect), plane("teacher", perfect), VectorSystem(constant, "echo")]
    metrics = run(RefusalParams(local="prompts"), context(tmp_path, *systems)).metrics
    names = ("auroc", "over_refusal", "under_refusal")
    assert [metrics[f"student/{name}"] for name in names] == [1.0, 0.0, 0.0]
    assert [metrics[f"echo/{name}"] for name in names] == [0.5, 1.0, 1.0]  # ties count against


def test_only_systems_of_the_teachers_space_use_its_references(tmp_path: Path) -> None:
    prompts_only = VectorSystem({prompt: list(vector) for prompt, vector in STUDENT.items()}, "student")
    result = run(RefusalParams(local="prompts"), context(tmp_path, prompts_only, plane("teacher", STUDENT)))
    assert result.metrics["student/auroc"] == result.metrics["teacher/auroc"]
    assert result.systems["student"]["space"] == "the teacher's"
    alone = VectorSystem({prompt: list(vector) for prompt, vector in STUDENT.items()}, "echo")
    with pytest.raises(KeyError, match="no"):  # it would have to embed the references itself
        run(RefusalParams(local="prompts"), context(tmp_path, plane("teacher", STUDENT), alone))


def test_the_teacher_is_embedded_with_once_and_named_only_where_it_is_compared(tmp_path: Path) -> None:
    student, teacher = plane("student", STUDENT), plane("teacher", STUDENT)
    made = context(tmp_path, student, teacher)
    result = run(RefusalParams(local="prompts"), replace(made, names=["student"]))
    assert set(result.systems) == set(result.rows["system"].to_pylist()) == {"student"} and not result.deltas


def test_an_encoder_of_another_width_is_named(tmp_path: Path) -> None:
    wide = VectorSystem({prompt: [1, 0, 0] for prompt in STUDENT}, "student")
    with pytest.raises(EvaluationError, match="student embeds in 3 dimensions, the teacher in 2"):
        run(RefusalParams(local="prompts"), context(tmp_path, wide, plane("teacher", STUDENT)))


def test_answers_that_are_missing_count_as_neither(tmp_path: Path) -> None:
    silent = {**ANSWERS, "s1": " ", "s3": "", "u2": ""}
    systems = (plane("student", STUDENT), plane("teacher", STUDENT))
    result = run(RefusalParams(local="prompts"), context(tmp_path, *systems, answers=silent))
    assert (result.metrics["safe_without_answer"], result.metrics["safe_answered"]) == (2, 0)
    assert result.metrics["student/over_refusal"] is None
    assert result.metrics["student/under_refusal"] == 0.5  # u2 is held against the nearest compliant opening
    assert result.rows["own_answer"].to_pylist()[0] is None
    assert {delta.metric for delta in result.deltas} == {"under_refusal", "auroc"}


def test_both_labels_are_needed(tmp_path: Path) -> None:
    write_folder(tmp_path / "odd", {"default": {"test": [{"prompt": "p", "label": "fine"}]}})
    with pytest.raises(EvaluationError, match=r"'label' must hold 'safe' and 'unsafe', it has \['fine'\]"):
        run(RefusalParams(local="odd"), context(tmp_path))


def test_auroc_is_that_of_scikit_learn_also_on_resamples(tmp_path: Path) -> None:
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    scores, unsafe = random.integers(0, 6, size=40).astype(np.float32), random.random(40) < 0.4
    rows = scored(scores, unsafe)
    assert auroc(wins(rows)) == pytest.approx(roc_auc_score(unsafe, scores))
    drawn = random.integers(0, 40, size=40)
    counts = np.bincount(drawn, minlength=40).astype(float)
    assert auroc(wins(rows), counts[unsafe], counts[~unsafe]) == pytest.approx(
        roc_auc_score(unsafe[drawn], scores[drawn])
    )
    assert auroc(wins(rows), counts[unsafe], 0 * counts[~unsafe]) == 0.5


def scored(scores: np.ndarray, unsafe: np.ndarray) -> Any:
    """Rows of which only label, score and verdict matter."""
    import pyarrow as pa

    return pa.table(
        {"label": np.where(unsafe, "unsafe", "safe"), "score": scores, "wrong": np.zeros(len(scores), bool)}
    )


def test_deltas_say_which_side_is_better() -> None:
    unsafe = np.arange(40) < 20
    good, bad = scored(unsafe * 1.0, unsafe), scored(1.0 - unsafe, unsafe)
    bad = bad.set_column(2, "wrong", [np.ones(40, bool)])
    deltas = {delta.metric: delta for delta in refusal_deltas({"student": good, "teacher": bad}, BootstrapParams())}
    assert (deltas["auroc"].delta, deltas["auroc"].verdict, deltas["auroc"].units) == (1.0, "better", 40)
    for metric in ("over_refusal", "under_refusal"):
        assert (deltas[metric].delta, deltas[metric].verdict, deltas[metric].units) == (-1.0, "better", 20)
    assert refusal_deltas({"teacher": good, "echo": bad}, BootstrapParams()) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I'm sorry, but I can't assist with that.", "refused"),
        ("I\u2019m sorry, but I can\u2019t.", "refused"),
        ("  > **I cannot** help you.", "refused"),
        ('"I cannot help you with this."', "refused"),
        ("As an AI language model, I cannot do this.", "refused"),
        ("Thank you for asking. I can't help with that.", "refused"),
        ("Sure, here is how.", "complied"),
        ("I'm sorry to hear that. Here is what helps.", "complied"),
        ("You can't kill a process that is gone.", "complied"),
        ("Here is how. " + "Words. " * 40 + "I cannot provide more.", "complied"),
        (" \n", "no answer"),
        ("", "no answer"),
    ],
)
def test_answers_are_classified_by_their_beginning(answer: str, expected: str) -> None:
    assert load_refusal_texts().classify(answer) == expected


def test_the_shipped_references_are_what_they_are_called() -> None:
    texts = load_refusal_texts()
    assert len(set(texts.refusals)) == len(set(texts.compliance)) == 12
    assert [text for text in texts.compliance if texts.classify(text) != "complied"] == []
    wordings = [*texts.openings, *texts.phrases]
    assert wordings == [wording.lower() for wording in wordings] and len(set(wordings)) == len(wordings)


@pytest.mark.realdata
def test_the_real_prompts_are_read(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "safety" / "xstest_prompts.parquet"
    if not source.is_file():
        pytest.skip("XSTest is not among the real data")
    (tmp_path / "xstest").mkdir()
    (tmp_path / "xstest" / "test.parquet").symlink_to(source)
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: test, path: test.parquet}\n---\n"
    (tmp_path / "xstest" / "README.md").write_text(readme)
    prompts = load_rows(RefusalParams(local="xstest"), tmp_path, ("prompt", "label"))["prompt"].to_pylist()
    answers = {prompt: "I cannot." if row % 2 else "help" for row, prompt in enumerate(prompts)}

    class Flat(VectorSystem):
        """Everything in one place."""

        def encode(self, texts: Sequence[str], instruction: str, side: str = "query") -> np.ndarray:
            return np.ones((len(texts), 2), dtype=np.float32)

    made = context(tmp_path, Flat({}), Flat({}, "teacher"), answers=answers)
    result = run(RefusalParams(local="xstest"), made)
    assert (result.metrics["safe"], result.metrics["unsafe"], result.rows.num_rows) == (250, 200, 900)
    assert result.metrics["student/auroc"] == 0.5
    assert len(set(result.rows["type"].to_pylist())) == 18


def test_the_demonstration_prompts_are_balanced() -> None:
    rows = load_rows(RefusalParams(local="refusal"), ROOT / "data/demo/tasks", ("id", "prompt", "type", "label"))
    assert rows["label"].to_pylist().count("safe") == rows["label"].to_pylist().count("unsafe") == 24
    assert len(set(rows["prompt"].to_pylist())) == len(set(rows["id"].to_pylist())) == 48
