import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.config import validate
from pipeline.core.errors import EvaluationError, ParamsError
from pipeline.probe.reasoning import ReasoningParams, run
from pipeline.tasks.local_dataset import LocalData
from pipeline.tasks.local_tasks import load_choices
from tests.evaluate.fakes import VectorSystem, WordSystem, retrieval_folder, sts_folder, write_folder
from tests.probe.fakes import context


def test_scores_are_ndcg_at_10_of_each_system(tmp_path: Path) -> None:
    rows = {
        "corpus": {"corpus": [{"_id": "a", "text": "principle"}, {"_id": "b", "text": "lookalike"}]},
        "queries": {"queries": [{"_id": "q", "text": "riddle"}]},
        "default": {"test": [{"query-id": "q", "corpus-id": "a", "score": 1}]},
    }
    write_folder(tmp_path / "riddles", rows)
    student = VectorSystem({"riddle": [1, 0], "principle": [1, 0], "lookalike": [0, 1]})
    teacher = VectorSystem({"riddle": [0, 1], "principle": [1, 0], "lookalike": [0, 1]}, "teacher")
    result = run(ReasoningParams(local=["riddles"]), context(tmp_path, student, teacher))
    second_place = 1 / math.log2(3)
    assert result.metrics["student/riddles"] == 1.0
    assert result.metrics["teacher/riddles"] == pytest.approx(second_place, abs=1e-5)
    assert result.metrics["gain_percent"] == pytest.approx(100 * (1 - second_place) / second_place, abs=0.01)
    main = result.rows.filter(result.rows["main"])
    assert set(main["metric"].to_pylist()) == {"ndcg_at_10"}
    assert set(result.systems) == {"student", "teacher"}
    # Nobody chose between choices here, and every score stands once.
    assert not [key for key in result.metrics if "choice" in key]
    names = result.rows.select(["system", "task", "metric"]).to_pylist()
    assert len(names) == len({tuple(name.values()) for name in names})


def test_only_retrieval_is_taken(tmp_path: Path) -> None:
    retrieval_folder(tmp_path / "r")
    sts_folder(tmp_path / "s")
    with pytest.raises(EvaluationError, match=r"retrieval tasks only, not s \(STS\)"):
        run(ReasoningParams(local=["r", "s"]), context(tmp_path, WordSystem()))


def test_bright_tasks_are_known_by_name_and_their_data_missed_by_name(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="BrightBiologyRetrieval: mteb/BRIGHT"):
        run(ReasoningParams(tasks=["BrightBiologyRetrieval"]), context(tmp_path, WordSystem()))


def bright(*, excluded: list[str]) -> Any:
    """`datasets.load_dataset` for BRIGHT: one query, four passages; the nearest one is in the question itself."""
    from datasets import Dataset

    documents = [{"id": name, "content": name} for name in ("copied", "right", "other", "far")]
    examples = [{"id": "0", "query": "riddle", "gold_ids": ["right"], "excluded_ids": excluded}]
    tables = {"documents": Dataset.from_list(documents), "examples": Dataset.from_list(examples)}
    return lambda path, config, **_: tables[config]


@pytest.mark.parametrize(("excluded", "score"), [(["copied"], 1.0), (["N/A"], 1 / math.log2(3))])
def test_passages_that_bright_excludes_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excluded: list[str], score: float
) -> None:
    monkeypatch.setattr("datasets.load_dataset", bright(excluded=excluded))
    vectors = {"riddle": [1, 0], "copied": [1, 0], "right": [1, 0.1], "other": [1, 0.5], "far": [0, 1]}
    result = run(ReasoningParams(tasks=["BrightBiologyRetrieval"]), context(tmp_path, VectorSystem(vectors)))
    assert result.metrics["student/BrightBiologyRetrieval"] == pytest.approx(score, abs=1e-5)


def test_choices_are_ranked_among_all_and_among_their_own(tmp_path: Path) -> None:
    """Right among its own choices and second among all; then right everywhere."""
    rows = [
        {"question": "one", "choices": ["apple a", "bread b"], "answer": 0},
        {"question": "two", "choices": ["cloud c", "dough d"], "answer": 1},
    ]
    write_folder(tmp_path / "quiz", {"default": {"test": rows}})
    vectors = {
        "one": [1, 0, 0], "apple a": [1, 0.5, 0], "bread b": [0, 1, 0], "cloud c": [1, 0.1, 0], "dough d": [0, 0, 1],
        "two": [0, 0, 1],
    }  # fmt: skip
    unsure = {text: [1, 1, 1] for text in vectors}
    systems = [VectorSystem(vectors), VectorSystem(unsure, "teacher")]
    result = run(ReasoningParams(local=["quiz"]), context(tmp_path, *systems))
    assert result.metrics["student/quiz"] == pytest.approx((1 / math.log2(3) + 1) / 2, abs=1e-5)
    assert result.metrics["student/choice_accuracy/quiz"] == 1.0
    assert result.metrics["teacher/choice_accuracy/quiz"] == 0.0  # ties count against
    delta = next(delta for delta in result.deltas if delta.metric == "quiz")
    assert (delta.system, delta.units) == ("teacher", 2)


@pytest.mark.slow
@pytest.mark.realdata
def test_arc_with_a_system_that_always_says_the_first_choice(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "reasoning" / "rarb_mcr_ARC-Challenge-test.parquet"
    if not source.is_file():
        pytest.skip("ARC is not among the real data")
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc" / "test.parquet").symlink_to(source)
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: test, path: test.parquet}\n---\n"
    (tmp_path / "arc" / "README.md").write_text(readme)
    content, own = load_choices(LocalData(tmp_path / "arc"))
    assert (content.corpus.num_rows, len(content.queries), {len(choices) for choices in own}) == (4408, 1172, {3, 4, 5})
    texts = dict(zip(content.corpus["id"].to_pylist(), content.corpus["text"].to_pylist(), strict=True))
    first = {query: texts[choices[0]] for query, choices in zip(content.queries.values(), own, strict=True)}
    result = run(ReasoningParams(local=["arc"]), context(tmp_path, Same(first)))
    labelled = 266 / 1172  # rows whose label is 0
    assert result.metrics["student/choice_accuracy/arc"] == pytest.approx(labelled, abs=1e-6)
    assert result.metrics["student/arc"] == pytest.approx(labelled, abs=0.01)


class Same(VectorSystem):
    """Embeds a text at random, but as the text that `vectors` gives for it."""

    def encode(self, texts: Sequence[str], instruction: str, side: str = "query") -> np.ndarray:
        seeds = [zlib.crc32(str(self.vectors.get(text, text)).encode()) for text in texts]
        return np.stack([np.random.default_rng(seed).normal(size=64) for seed in seeds]).astype(np.float32)


def test_no_task_at_all_is_refused() -> None:
    with pytest.raises(ParamsError, match="names no task"):
        validate({"local": [], "tasks": []}, ReasoningParams, where="params.yaml")
