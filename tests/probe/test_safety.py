import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import validate
from pipeline.core.errors import ParamsError
from pipeline.probe.safety import QUERY_INSTRUCTION, SafetyParams, reductions, run
from pipeline.probe.sources import SourceParams
from pipeline.tasks.instructions import load_instructions
from tests.evaluate.fakes import WORDS, VectorSystem, WordSystem, retrieval_folder, write_folder
from tests.probe.fakes import context


def test_obedient_and_refusing_systems(tmp_path: Path) -> None:
    """The teacher finds each request's own passage first; the student the next word's, harmful too."""
    retrieval_folder(tmp_path / "bad")
    student, teacher = WordSystem(shift=1), WordSystem("teacher")
    result = run(SafetyParams(local="bad", top_k=[1, 8]), context(tmp_path, student, teacher))
    expected = {
        "requests": 8, "malicious_passages": 8, "harmless_passages": 0,
        "teacher/accuracy@1": 1.0, "teacher/any_harm@1": 1.0, "student/accuracy@1": 0.0, "student/any_harm@1": 1.0,
        "reduction/student/accuracy@1": 100.0, "reduction/student/any_harm@1": 0.0, "student/accuracy@8": 1.0,
    }  # fmt: skip
    assert expected.items() <= result.metrics.items()
    assert student.calls[0] == (QUERY_INSTRUCTION, [f"{word} what is it?" for word in WORDS])
    assert student.calls[1][0] == load_instructions().document
    assert student.calls[1][1][0] == "apple # is a word"


def test_any_harm_differs_from_accuracy_where_harmless_passages_are_nearer(tmp_path: Path) -> None:
    rows = {
        "corpus": {"corpus": [{"_id": name, "text": name} for name in ("mine", "other", "kind")]},
        "queries": {"queries": [{"_id": "q1", "text": "ask1"}, {"_id": "q2", "text": "ask2"}]},
        "default": {
            "test": [
                {"query-id": "q1", "corpus-id": "mine", "score": 1},
                {"query-id": "q2", "corpus-id": "other", "score": 1},
            ]
        },
    }
    write_folder(tmp_path / "bad", rows)
    vectors = {"ask1": [1, 0, 0], "ask2": [0, 0, 1], "mine": [1, 1, 0], "other": [5, 1, 0], "kind": [0, 0.1, 1]}
    result = run(SafetyParams(local="bad", top_k=[1, 2]), context(tmp_path, VectorSystem(vectors)))
    # ask1: other, mine, kind; ask2: kind, then a tie of mine and other
    assert result.metrics["student/accuracy@1"] == 0.0
    assert result.metrics["student/any_harm@1"] == 0.5
    assert result.metrics["student/accuracy@2"] == 0.5
    assert result.metrics["student/any_harm@2"] == 1.0
    assert result.metrics["harmless_passages"] == 1
    first = result.rows.slice(0, 1).to_pylist()[0]
    assert (first["query"], first["rank"], first["passage"], first["relevant"], first["malicious"]) == (
        "q1", 1, "other", False, True,
    )  # fmt: skip


def test_harmless_passages_are_mixed_in(tmp_path: Path) -> None:
    retrieval_folder(tmp_path / "bad")
    retrieval_folder(tmp_path / "wiki")
    params = SafetyParams(local="bad", harmless=SourceParams(local="wiki"), top_k=[1])
    result = run(params, context(tmp_path, WordSystem()))
    assert (result.metrics["malicious_passages"], result.metrics["harmless_passages"]) == (8, 8)
    assert "harmless:d-apple" not in result.rows["passage"].to_pylist()


def test_the_users_instructions_are_for_probes_too(tmp_path: Path) -> None:
    retrieval_folder(tmp_path / "bad")
    (tmp_path / "mine.yaml").write_text("document: 'Condense:'\n")
    student = WordSystem()
    made = replace(context(tmp_path, student), instructions=tmp_path / "mine.yaml")
    run(SafetyParams(local="bad", top_k=[1]), made)
    assert student.calls[1][0] == "Condense:"


def test_a_corpus_without_harmless_passages_is_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    retrieval_folder(tmp_path / "bad")
    with caplog.at_level(logging.WARNING):
        run(SafetyParams(local="bad", top_k=[1]), context(tmp_path, WordSystem()))
    assert "any_harm is 1 by construction" in caplog.text


def test_every_delta_is_over_requests_and_lower_is_better(tmp_path: Path) -> None:
    """The student finds no request's own passage at first place, the teacher all of them, `half` every second one."""
    retrieval_folder(tmp_path / "bad", extra=WORDS)

    class Half(WordSystem):
        """Right for the first four words only."""

        def encode(self, texts: Sequence[str], instruction: str, side: str = "query") -> Any:
            vectors = super().encode(texts, instruction)
            if side == "query":
                vectors[4:] = vectors[3:-1]
            return vectors

    systems = [WordSystem(shift=1), WordSystem("teacher"), Half("half")]
    deltas = {
        (delta.metric, delta.system): delta
        for delta in run(SafetyParams(local="bad", top_k=[1]), context(tmp_path, *systems)).deltas
    }
    assert set(deltas) == {(m, s) for m in ("accuracy@1", "any_harm@1") for s in ("teacher", "half")}
    whole, half = deltas["accuracy@1", "teacher"], deltas["accuracy@1", "half"]
    assert (whole.delta, whole.low, whole.high, whole.verdict, whole.units) == (-1.0, -1.0, -1.0, "better", 8)
    assert half.delta == -0.5 and half.low is not None and -1 < half.low < -0.5 and half.verdict == "better"
    assert deltas["any_harm@1", "teacher"].verdict == "within noise"


def test_documents_are_cut_and_judged_by_passage(tmp_path: Path) -> None:
    rows = [
        {"ID": 0, "query": "apple ?", "title": "", "document": "apple bread cloud"},
        {"ID": 1, "query": "dough", "title": "", "document": "eagle dough"},
    ]
    write_folder(tmp_path / "bad", {"default": {"train": rows}})
    params = SafetyParams(local="bad", chunk_words=1, top_k=[1])
    system = WordSystem(shift=1)  # "apple ?" is read as bread, the second word of its document
    result = run(params, context(tmp_path, system))
    expected = {"documents": 2, "malicious_passages": 5, "dropped_tails": 0, "student/accuracy@1": 1.0}
    assert expected.items() <= result.metrics.items()
    assert result.rows["passage"].to_pylist() == ["0#1", "1#1"]
    whole = run(SafetyParams(local="bad", chunk_words=None, top_k=[1]), context(tmp_path, WordSystem(shift=1)))
    assert whole.metrics["malicious_passages"] == 2 and "dropped_tails" not in whole.metrics
    assert whole.rows["passage"].to_pylist() == ["0", "0"]  # no document begins with the words asked for


def test_reductions_are_percent_of_the_teacher() -> None:
    metrics: dict[str, Any] = {"teacher/accuracy@5": 0.5, "student/accuracy@5": 0.4, "teacher/x": 0.0, "student/x": 0.1}
    assert reductions(metrics, ["student", "teacher"]) == {
        "reduction/student/accuracy@5": 20.0,
        "reduction/student/x": None,
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"local": "x", "top_k": []}, "top_k"),
        ({"local": "x", "chunk_words": 0}, "chunk_words"),
        ({"local": "x", "top_k": [0]}, r"top_k\.0"),
        ({"local": "x", "topk": [1]}, "did you mean 'top_k'"),
    ],
)
def test_params_are_checked(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        validate(entry, SafetyParams, where="params.yaml")


@pytest.mark.realdata
def test_the_real_passages_are_all_malicious_and_found_by_their_own_request(real_data: Path) -> None:
    folder = real_data / "hub" / "McGill-NLP"
    if not folder.is_dir():
        pytest.skip("AdvBench-IR is not among the real data")

    class Oracle(WordSystem):
        """Embeds every text as the same vector, so passages rank in the order of the corpus."""

        def encode(self, texts: Sequence[str], instruction: str, side: str = "query") -> Any:
            import numpy as np

            return np.ones((len(texts), 2), dtype=np.float32)

    result = run(SafetyParams(local="AdvBench-IR-chunked"), context(folder, Oracle()))
    assert (result.metrics["requests"], result.metrics["malicious_passages"]) == (520, 1796)
    assert result.metrics["student/accuracy@1"] == pytest.approx(1 / 520, abs=1e-6)
    assert result.metrics["student/any_harm@1"] == 1.0
    assert result.rows.num_rows == 520 * 100
