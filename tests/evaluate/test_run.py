import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import EvaluationError
from pipeline.evaluate.run import SystemResults, run_systems
from pipeline.evaluate.summary import flat_metrics, summary_table, task_scores, write_mteb_format
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.suites import find_tasks
from tests.conftest import ROOT
from tests.evaluate.fakes import (
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


def test_ids_of_top_ranked_may_be_numbers_and_must_be_known(tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        "corpus": {"corpus": [{"_id": 0, "text": "far"}, {"_id": 1, "text": "near"}]},
        "queries": {"queries": [{"_id": 7, "text": "ask"}]},
        "default": {"test": [{"query-id": 7, "corpus-id": 0, "score": 1}]},
        "top_ranked": {"test": [{"query-id": 7, "corpus-ids": [0]}]},
    }
    system = VectorSystem({"ask": [1, 0], "near": [9, 1], "far": [1, 1]})
    _, scores = run([system], [write_folder(tmp_path / "numbers", rows)], tmp_path / "work")
    assert scores["student"]["numbers"] == pytest.approx(1.0)
    rows["top_ranked"]["test"] = [{"query-id": 7, "corpus-ids": [0, 5]}]
    with pytest.raises(EvaluationError, match="top_ranked name 1 ids that config 'corpus' lacks, first: '5'"):
        run([system], [write_folder(tmp_path / "strange", rows)], tmp_path / "work")
    rows["top_ranked"]["test"] = [{"query-id": 8, "corpus-ids": [0]}]
    with pytest.raises(EvaluationError, match="judgements name 1 ids that config 'top_ranked' lacks, first: '7'"):
        run([system], [write_folder(tmp_path / "lacking", rows)], tmp_path / "work")


def test_what_a_system_failed_on_is_run_again(tmp_path: Path) -> None:
    """HyDE without an answer embeds the text itself: that score is given, and not kept."""

    class Failing(WordSystem):
        failed = 0

        def encode(self, texts: Any, instruction: str, side: Any = "query") -> np.ndarray:
            self.failed += self.version == 0
            return super().encode(texts, instruction, side)

        @property
        def identity(self) -> dict[str, Any]:
            return {"fake": "hyde"}

    folder = [sts_folder(tmp_path / "pairs")]
    for version, computed in ((0, 1), (1, 1), (1, 0)):
        (found,), scores = run([Failing("hyde", version=version)], folder, tmp_path / "work")
        assert (found.computed, scores["hyde"]["pairs"]) == (computed, pytest.approx(1.0))


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
    assert summary.filter(summary["main"]).num_rows == 8
    find = {row["metric"] for row in summary.to_pylist() if row["task"] == "find"}
    assert {"ndcg_at_10", "map_at_10", "recall_at_100"} <= find and "main_score" not in find
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


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:99])])
def test_a_result_without_its_findings_is_run_again(
    tmp_path: Path, folders: list[Path], caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    first, _ = run([WordSystem()], folders[:1], tmp_path / "work")
    (path,) = (tmp_path / "work").rglob("find.findings.npz")
    damage(path)
    runs, _ = run([WordSystem()], folders[:1], tmp_path / "work")
    assert runs[0].computed == 1
    assert runs[0].findings[0][0].found.tolist() == first[0].findings[0][0].found.tolist()
    assert "find.findings.npz is missing or damaged: running find again" in caplog.text


KILLED = """
import json, os, signal, sys
from pathlib import Path
from tests.evaluate.test_run import run
from tests.evaluate.fakes import WordSystem

class Dying(WordSystem):
    def encode(self, texts, instruction, side="query"):
        if "apple one" in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(texts, instruction, side)

run([Dying()], [Path(folder) for folder in json.loads(sys.argv[1])], Path(sys.argv[2]))
"""


def test_a_killed_run_repeats_no_finished_task(tmp_path: Path, folders: list[Path]) -> None:
    """Killed while the pairs were embedded, which come second."""
    arguments = [json.dumps([str(folder) for folder in folders]), str(tmp_path / "work")]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(list((tmp_path / "work").rglob("find.json"))) == 1
    assert not list((tmp_path / "work").rglob("pairs.json"))
    system = WordSystem()
    runs, scores = run([system], folders, tmp_path / "work")
    assert runs[0].computed == 2
    assert scores["student"] == pytest.approx({"find": 1.0, "pairs": 1.0, "sort": 1.0})
    embedded = {text for _, texts in system.calls for text in texts}
    assert "apple one" in embedded and "apple what is it?" not in embedded and "apple is a word" not in embedded


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
        runs, _ = run([Named("student", STUDENT)], folders, tmp_path / f"work-{name}")
        write_mteb_format(tmp_path / name, runs)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.json"))
    assert {path.name for path in files} == {"find.json", "pairs.json", "sort.json", "model_meta.json"}
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    (model,) = mteb.ResultCache(tmp_path / "a").load_results().model_results
    assert model.model_name == "llm2vec-gen/tiny-lm-llm2vec-gen" and model.model_revision == "c0ffee" * 6 + "c0ff"
    assert {result.task_name for result in model.task_results} == {"find", "pairs", "sort"}


class Named(WordSystem):
    """A system with the identity of a real one."""

    def __init__(self, name: str, identity: dict[str, Any], prompting: str = "none") -> None:
        super().__init__(name, prompting=prompting)
        self._identity = identity

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity


BACKBONE = {"name": "models/tiny-lm", "sha256": "b" * 64}
CONFIG = {"backbone": BACKBONE, "width": 8, "max_query_tokens": 64}
STUDENT = {"name": "encoder", "sha256": "c0ffee" * 10 + "c0ff", "config": CONFIG}


def test_systems_are_published_under_real_names_and_never_over_one_another(tmp_path: Path, folders: list[Path]) -> None:
    import mteb

    minilm = {"name": "/somewhere/all-MiniLM-L6-v2", "sha256": "a" * 64, "kind": "sentence-transformers"}
    systems = [
        Named("student", STUDENT, "generative instruction"),
        Named("teacher", minilm, "bare text"),
        Named("mini", minilm, "query prompt 'q: '"),
        Named("untrained", {"name": "untrained", "seed": 0, "backbone": BACKBONE, "config": CONFIG}),
        Named("untrained-1", {"name": "untrained", "seed": 1, "backbone": BACKBONE, "config": CONFIG}),
        Named("mapped", minilm | {"transform": {"kind": "center", "sha256": "d" * 64}}),
        Named("llm2vec", {"name": "Qwen/Q", "revision": "e" * 40, "kind": "llm2vec", "adapters": [{"name": "a/b"}]}),
        Named("mean", {"name": "Qwen/Q", "revision": "e" * 40, "kind": "backbone"}),
        Named("bge", {"name": "BAAI/bge-small-en-v1.5", "revision": "5c38ec7c405ec4b44b94cc5a9bb96e735b38267a"}),
    ]
    tasks = find_tasks(folders[:1])
    runs = run_systems(
        systems, tasks, INSTRUCTIONS, work=tmp_path / "work", batch_size=4, dtype="float32", model_name="me/mine"
    )
    write_mteb_format(tmp_path / "out", runs)
    found = mteb.ResultCache(tmp_path / "out").load_results().model_results
    assert {model.model_name: model.model_revision[:6] for model in found} == {
        "me/mine": "c0ffee",
        "local/all-MiniLM-L6-v2": "aaaaaa",
        "local/all-MiniLM-L6-v2-mini": "aaaaaa",
        "llm2vec-gen/tiny-lm-untrained": runs[3].meta.revision[:6],
        "llm2vec-gen/tiny-lm-untrained-1": runs[4].meta.revision[:6],
        "llm2vec-gen/all-MiniLM-L6-v2-mapped": runs[5].meta.revision[:6],
        "llm2vec-gen/Q-llm2vec": runs[6].meta.revision[:6],
        "llm2vec-gen/Q-mean": runs[7].meta.revision[:6],
        "BAAI/bge-small-en-v1.5": "5c38ec",
    }
    assert [run.meta.adapted_from for run in runs[5:]] == [minilm["name"], "Qwen/Q", "Qwen/Q", None]
    assert not {run.meta.revision[:6] for run in runs[5:8]} & {"aaaaaa", "eeeeee"}
    student = runs[0].meta
    assert (student.embed_dim, student.max_tokens, student.use_instructions) == (8, 64, True)
    assert student.n_parameters is None and student.open_weights is None
    assert runs[1].meta.framework == ["Sentence Transformers", "PyTorch"] and not runs[1].meta.use_instructions
    assert all(len(run.meta.revision) == 40 for run in runs)


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


def test_missing_data_is_listed_at_once_and_before_any_work(tmp_path: Path, folders: list[Path]) -> None:
    tasks = find_tasks(folders[:1], ["STS12", "ArguAna"])
    system = WordSystem()
    with pytest.raises(EvaluationError, match=r"data of 2 of 3 tasks cannot be loaded(.|\n)*STS12: (.|\n)*ArguAna: "):
        run_systems([system], tasks, INSTRUCTIONS, work=tmp_path / "work", batch_size=4, dtype="float32")
    assert not system.calls


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Broken(WordSystem):
        def encode(self, texts: Any, instruction: str, side: str = "query") -> np.ndarray:
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
        def encode(self, texts: Any, instruction: str, side: str = "query") -> np.ndarray:
            return np.ones((len(texts), 2), dtype=np.float32)

    _, scores = run([Constant()], [classification_folder(tmp_path / "sort")], tmp_path / "work")
    assert scores["student"]["sort"] == pytest.approx(1 / 3, abs=0.01)
