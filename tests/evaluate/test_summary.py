"""Scores as a table, as flat metrics and as files of mteb."""

from pathlib import Path

import pytest

from pipeline.evaluate.run import SystemResults, run_systems
from pipeline.evaluate.summary import flat_metrics, summary_table, task_scores, write_mteb_format
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.suites import find_tasks
from tests.evaluate.fakes import STUDENT, Named, WordSystem, retrieval_folder
from tests.evaluate.test_run import run

INSTRUCTIONS = load_instructions()


def test_metrics_are_flat_with_deltas_and_both_means(tmp_path: Path, folders: list[Path]) -> None:
    second = retrieval_folder(tmp_path / "find2", extra=["apple"])
    tasks = find_tasks([*folders, second])
    systems = [WordSystem(), WordSystem("teacher", shift=1)]
    runs = run_systems(systems, tasks, INSTRUCTIONS, work=tmp_path / "work", dtype="float32")
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
    assert summary.filter(summary["main"]).num_rows == 8
    find = {row["metric"] for row in summary.to_pylist() if row["task"] == "find"}
    assert {"ndcg_at_10", "map_at_10", "recall_at_100"} <= find and "main_score" not in find
    assert summary["data_revision"][0].as_py() == tasks[0].metadata.revision


def test_the_mteb_folder_is_read_by_mteb_and_equal_for_equal_scores(tmp_path: Path, folders: list[Path]) -> None:
    import mteb

    for name in ("a", "b"):
        runs, _ = run([Named("student", STUDENT)], folders, tmp_path / f"work-{name}")
        write_mteb_format(tmp_path / name, runs)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.json"))
    assert {path.name for path in files} == {"find.json", "pairs.json", "sort.json", "model_meta.json"}
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    (model,) = mteb.ResultCache(tmp_path / "a").load_results().model_results
    assert model.model_name == "llm2vec-gen/tiny-lm-llm2vec-gen" and model.model_revision == "c0ffee" * 6 + "c0ff"
    assert {result.task_name for result in model.task_results} == {"find", "pairs", "sort"}


def test_means_are_those_of_the_leaderboard() -> None:
    """Two tasks of one type, one of them with two splits and one with two subsets; against mteb's own table."""
    import mteb
    from mteb.benchmarks._create_table import _create_summary_table  # what the leaderboard shows
    from mteb.results import BenchmarkResults, ModelResult, TaskResult

    tasks = [
        mteb.get_task("STS13"),
        mteb.get_task("STS22.v2", hf_subsets=["en", "de"]),
        mteb.get_task("Banking77Classification", eval_splits=["test"]),
    ]
    splits = [
        {"test": {"default": 0.5}},
        {"test": {"en": 0.7, "de": 0.4}},
        {"test": {"default": 0.9}},
    ]
    results = [
        TaskResult.from_task_results(
            task,
            {
                split: {
                    subset: {"main_score": score, task.metadata.main_score: score} for subset, score in found.items()
                }
                for split, found in scores.items()
            },
            evaluation_time=1.0,
        )
        for task, scores in zip(tasks, splits, strict=True)
    ]
    name, revision = "sentence-transformers/all-MiniLM-L6-v2", "8b3219a92973c328a8e22fadcfa821b5dc75636a"
    runs = [SystemResults("student", {}, "none", None, results)]
    ours = flat_metrics(summary_table(tasks, runs))
    model = ModelResult(model_name=name, model_revision=revision, task_results=results)
    table = _create_summary_table(BenchmarkResults(model_results=[model])._to_results_df(tasks)).df
    (theirs,) = table.to_dicts()
    assert ours["student/mean/tasks"] == pytest.approx(theirs["Mean (Task)"]) == pytest.approx((0.5 + 0.55 + 0.9) / 3)
    assert ours["student/mean/types"] == pytest.approx(theirs["Mean (TaskType)"])
    assert ours["student/type/STS"] == pytest.approx(theirs["STS"])
