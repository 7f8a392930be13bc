import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import EvaluationError
from pipeline.evaluation.instructions import load_instructions
from pipeline.evaluation.running import SystemResults, run_systems
from pipeline.evaluation.suites import find_tasks
from pipeline.evaluation.summary import flat_metrics, summary_table, task_scores, write_mteb_format
from tests.evaluation_fakes import (
    VectorSystem,
    WordSystem,
    classification_folder,
    retrieval_folder,
    sts_folder,
    write_folder,
)

INSTRUCTIONS = load_instructions()


def run(systems: list[Any], folders: list[Path], work: Path) -> tuple[list[SystemResults], dict[str, dict[str, float]]]:
    tasks = find_tasks(folders)
    runs = run_systems(systems, tasks, INSTRUCTIONS, work=work, batch_size=4, dtype="float32")
    return runs, task_scores(summary_table(tasks, runs))


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [
        retrieval_folder(tmp_path / "find"),
        sts_folder(tmp_path / "pairs"),
        classification_folder(tmp_path / "sort"),
    ]


def test_a_perfect_system_scores_1_on_every_layout(tmp_path: Path, folders: list[Path]) -> None:
    system = WordSystem()
    _, scores = run([system], folders, tmp_path / "work")
    assert scores["student"] == pytest.approx({"find": 1.0, "pairs": 1.0, "sort": 1.0})
    assert {instruction for instruction, texts in system.calls if "apple is a word" in texts} == {INSTRUCTIONS.document}
    assert {instruction for instruction, texts in system.calls if "apple what is it?" in texts} == {
        INSTRUCTIONS.types["Retrieval"].query
    }


def test_ndcg_of_a_second_place_is_known_by_hand(tmp_path: Path) -> None:
    rows = {
        "corpus": {"corpus": [{"_id": "a", "text": "far"}, {"_id": "b", "text": "near"}]},
        "queries": {"queries": [{"_id": "q", "text": "ask"}]},
        "qrels": {"test": [{"query-id": "q", "corpus-id": "a", "score": 1}]},
    }
    system = VectorSystem({"ask": [1, 0], "near": [9, 1], "far": [1, 1]})
    _, scores = run([system], [write_folder(tmp_path / "second", rows)], tmp_path / "work")
    assert scores["student"]["second"] == pytest.approx(1 / math.log2(3), abs=1e-5)


def test_passages_outside_top_ranked_are_not_found(tmp_path: Path) -> None:
    rows = {
        "corpus": {"corpus": [{"_id": "a", "text": "far"}, {"_id": "b", "text": "near"}]},
        "queries": {"queries": [{"_id": "q", "text": "ask"}]},
        "default": {"test": [{"query-id": "q", "corpus-id": "a", "score": 1}]},
        "top_ranked": {"test": [{"query-id": "q", "corpus-ids": ["a"]}]},
    }
    system = VectorSystem({"ask": [1, 0], "near": [9, 1], "far": [1, 1]})
    _, scores = run([system], [write_folder(tmp_path / "excluded", rows)], tmp_path / "work")
    assert scores["student"]["excluded"] == pytest.approx(1.0)


def test_metrics_are_flat_with_deltas_and_both_means(tmp_path: Path, folders: list[Path]) -> None:
    second = retrieval_folder(tmp_path / "find2", extra=["apple"])
    tasks = find_tasks([*folders, second])
    systems = [WordSystem(), WordSystem("teacher", shift=1)]
    runs = run_systems(systems, tasks, INSTRUCTIONS, work=tmp_path / "work", batch_size=4, dtype="float32")
    summary = summary_table(tasks, runs)
    metrics = flat_metrics(summary)
    scores = task_scores(summary)["teacher"]
    assert metrics["student/find"] == 1.0
    assert scores["find"] < 0.5
    assert metrics["delta/find"] == pytest.approx(1 - scores["find"], abs=1e-6)
    assert metrics["teacher/mean/tasks"] == pytest.approx(sum(scores.values()) / 4, abs=1e-6)
    by_type = [(scores["find"] + scores["find2"]) / 2, scores["pairs"], scores["sort"]]
    assert metrics["teacher/mean/types"] == pytest.approx(sum(by_type) / 3, abs=1e-6)
    assert metrics["teacher/type/Retrieval"] == pytest.approx(by_type[0], abs=1e-6)
    assert summary.num_rows == 8
    assert summary["data_revision"][0].as_py() == tasks[0].metadata.revision


def test_finished_tasks_are_not_run_again(tmp_path: Path, folders: list[Path]) -> None:
    first, again = WordSystem(), WordSystem()
    runs, scores = run([first], folders[:1], tmp_path / "work")
    assert (runs[0].computed, len(first.calls)) == (1, 2)
    runs, grown = run([again], folders[:2], tmp_path / "work")
    assert runs[0].computed == 1
    assert all("apple is a word" not in texts for _, texts in again.calls)
    assert grown["student"]["find"] == scores["student"]["find"]


def test_other_weights_and_other_data_are_never_served_old_scores(tmp_path: Path) -> None:
    folder = retrieval_folder(tmp_path / "find")
    run([WordSystem()], [folder], tmp_path / "work")
    retrained = WordSystem(shift=1)
    runs, scores = run([retrained], [folder], tmp_path / "work")
    assert runs[0].computed == 1 and scores["student"]["find"] < 1
    retrieval_folder(folder, extra=["apple", "apple pie"])
    runs, _ = run([WordSystem()], [folder], tmp_path / "work")
    assert runs[0].computed == 1


def test_a_half_written_result_is_run_again(
    tmp_path: Path, folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    run([WordSystem()], folders[:1], tmp_path / "work")
    (path,) = (tmp_path / "work").rglob("find.json")
    path.write_text(path.read_text()[:100])
    runs, scores = run([WordSystem()], folders[:1], tmp_path / "work")
    assert runs[0].computed == 1 and scores["student"]["find"] == 1.0
    assert "find.json is damaged: running find again" in caplog.text


def test_the_mteb_folder_is_read_by_mteb_and_equal_for_equal_scores(tmp_path: Path, folders: list[Path]) -> None:
    import mteb

    for name in ("a", "b"):
        runs, _ = run([WordSystem()], folders, tmp_path / f"work-{name}")
        write_mteb_format(tmp_path / name, runs)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.json"))
    assert {path.name for path in files} == {"find.json", "pairs.json", "sort.json", "model_meta.json"}
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    (model,) = mteb.ResultCache(tmp_path / "a").load_results().model_results
    assert model.model_name == "llm2vec-gen/student" and model.model_revision == runs[0].meta.revision
    assert {result.task_name for result in model.task_results} == {"find", "pairs", "sort"}


def test_missing_data_is_listed_at_once_and_before_any_work(tmp_path: Path, folders: list[Path]) -> None:
    tasks = find_tasks(folders[:1], ["STS12", "ArguAna"])
    system = WordSystem()
    with pytest.raises(EvaluationError, match=r"data of 2 of 3 tasks cannot be loaded(.|\n)*STS12: (.|\n)*ArguAna: "):
        run_systems([system], tasks, INSTRUCTIONS, work=tmp_path / "work", batch_size=4, dtype="float32")
    assert not system.calls


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Broken(WordSystem):
        def encode(self, texts: Any, instruction: str) -> np.ndarray:
            return super().encode(texts, instruction) * np.nan

    with pytest.raises(
        EvaluationError, match=r"student, task 'pairs', split 'test': 16 of 16 embeddings are not finite"
    ):
        run([Broken()], [sts_folder(tmp_path / "pairs")], tmp_path / "work")


def test_unknown_names_and_doubles_are_refused(tmp_path: Path, folders: list[Path]) -> None:
    with pytest.raises(EvaluationError, match="mteb has no task 'STSBenchmrk'"):
        find_tasks([], ["STSBenchmrk"])
    with pytest.raises(EvaluationError, match=r"mteb has no benchmark 'MTEB\(eng, v9\)'"):
        find_tasks([], [], "MTEB(eng, v9)")
    with pytest.raises(EvaluationError, match="named twice in one suite: find"):
        find_tasks([folders[0], folders[0]])


def test_a_system_that_predicts_no_class_scores_without_noise(tmp_path: Path) -> None:
    class Constant(WordSystem):
        def encode(self, texts: Any, instruction: str) -> np.ndarray:
            return np.ones((len(texts), 2), dtype=np.float32)

    _, scores = run([Constant()], [classification_folder(tmp_path / "sort")], tmp_path / "work")
    assert scores["student"]["sort"] == pytest.approx(1 / 3, abs=0.01)
