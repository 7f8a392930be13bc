"""Systems run on local tasks, and on what finished before."""

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import EvaluationError, WorkError
from pipeline.evaluate.run import SystemResults, run_systems
from pipeline.evaluate.summary import summary_table, task_scores
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
    runs = run_systems(systems, tasks, INSTRUCTIONS, work=work, dtype="float32")
    return runs, task_scores(summary_table(tasks, runs))


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


def test_a_score_with_fallbacks_is_never_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill at any write would otherwise keep it."""

    class Failing(WordSystem):
        failed = 0

        def encode(self, texts: Any, instruction: str, side: Any = "query") -> np.ndarray:
            self.failed += 1
            return super().encode(texts, instruction, side)

    monkeypatch.setattr("pipeline.evaluate.run.write_bytes", None)
    (found,), scores = run([Failing("hyde")], [sts_folder(tmp_path / "pairs")], tmp_path / "work")
    assert (found.computed, scores["hyde"]["pairs"]) == (1, pytest.approx(1.0))
    assert [path.name for path in (tmp_path / "work").rglob("*") if path.is_file()] == []


def test_what_a_killed_run_left_beside_its_result_goes(tmp_path: Path, folders: list[Path]) -> None:
    run([WordSystem()], folders, tmp_path / "work")
    [result] = (tmp_path / "work").rglob("sort.json")
    (leftover := result.with_name(".sort.json.tmp-killed")).mkdir()
    (leftover / "predictions.json").write_text("{")
    result.unlink()
    run([WordSystem()], folders, tmp_path / "work")
    assert result.is_file() and not [path.name for path in result.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("suffix", [".json", ".findings.npz", ".digests.json"])
def test_a_flipped_digit_of_a_finished_score_is_noticed(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = [sts_folder(tmp_path / "pairs")]
    run([WordSystem()], folder, tmp_path / "work")
    [file] = (tmp_path / "work").rglob(f"pairs{suffix}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    (found,), scores = run([WordSystem()], folder, tmp_path / "work")
    assert (found.computed, scores["student"]["pairs"]) == (1, pytest.approx(1.0))
    assert "running pairs again" in caplog.text
    assert run([WordSystem()], folder, tmp_path / "work")[0][0].computed == 0


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
def test_a_result_without_its_unit_scores_is_run_again(
    tmp_path: Path, folders: list[Path], caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    first, _ = run([WordSystem()], folders[:1], tmp_path / "work")
    (path,) = (tmp_path / "work").rglob("find.findings.npz")
    damage(path)
    runs, _ = run([WordSystem()], folders[:1], tmp_path / "work")
    assert runs[0].computed == 1
    assert runs[0].unit_scores[0][0].predicted.tolist() == first[0].unit_scores[0][0].predicted.tolist()
    assert re.search(r"find\.findings\.npz is (missing or )?damaged: running find again", caplog.text)


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


@pytest.mark.slow
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


def test_a_full_disk_before_any_work_is_one_line(
    tmp_path: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mteb.ResultCache", full)
    with pytest.raises(WorkError, match="cannot write .*work: No space left"):
        run([WordSystem()], folders, tmp_path / "work")


def test_missing_data_is_listed_at_once_and_before_any_work(tmp_path: Path, folders: list[Path]) -> None:
    tasks = find_tasks(folders[:1], ["STS12", "ArguAna"])
    system = WordSystem()
    with pytest.raises(EvaluationError, match=r"data of 2 of 3 tasks cannot be loaded(.|\n)*STS12: (.|\n)*ArguAna: "):
        run_systems([system], tasks, INSTRUCTIONS, work=tmp_path / "work", dtype="float32")
    assert not system.calls


def test_embeddings_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Broken(WordSystem):
        def encode(self, texts: Any, instruction: str, side: str = "query") -> np.ndarray:
            return super().encode(texts, instruction) * np.nan

    with pytest.raises(
        EvaluationError, match=r"student, task 'pairs', split 'test': 16 of 16 embeddings are not finite"
    ):
        run([Broken()], [sts_folder(tmp_path / "pairs")], tmp_path / "work")


def test_a_system_that_predicts_no_class_scores_without_noise(tmp_path: Path) -> None:
    class Constant(WordSystem):
        def encode(self, texts: Any, instruction: str, side: str = "query") -> np.ndarray:
            return np.ones((len(texts), 2), dtype=np.float32)

    _, scores = run([Constant()], [classification_folder(tmp_path / "sort")], tmp_path / "work")
    assert scores["student"]["sort"] == pytest.approx(1 / 3, abs=0.01)
