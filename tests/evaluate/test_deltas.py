import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.core.bootstrap import BootstrapParams, paired_delta
from pipeline.evaluate.deltas import deltas_table, task_deltas
from pipeline.evaluate.run import SystemResults, run_systems
from pipeline.evaluate.summary import flat_metrics, summary_table
from pipeline.evaluate.unit_scores import UnitScores
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.suites import find_tasks
from tests.evaluate.fakes import WORDS, VectorSystem, WordSystem, classification_folder, retrieval_folder, sts_folder

SETTINGS = BootstrapParams()


def run(folders: list[Path], systems: list[Any], work: Path) -> tuple[list[Any], list[SystemResults]]:
    tasks = find_tasks(folders)
    return tasks, run_systems(systems, tasks, load_instructions(), work=work, dtype="float32")


def test_every_task_type_and_mean_is_compared_with_every_system(tmp_path: Path) -> None:
    folders = [
        retrieval_folder(tmp_path / "find"),
        sts_folder(tmp_path / "pairs"),
        classification_folder(tmp_path / "sort"),
    ]
    systems = [WordSystem(), WordSystem("teacher", shift=1), WordSystem("twin")]
    tasks, runs = run(folders, systems, tmp_path / "work")
    deltas = {(delta.system, delta.metric): delta for delta in task_deltas(tasks, runs, SETTINGS)}
    names = ["find", "pairs", "sort", "type/Retrieval", "type/STS", "type/Classification", "mean/tasks", "mean/types"]
    assert list(deltas) == [(system, name) for system in ("teacher", "twin") for name in names]
    metrics = flat_metrics(summary_table(tasks, runs))
    for name in names:
        assert deltas["teacher", name].delta == pytest.approx(metrics[f"delta/{name}"], abs=2e-6)
        assert deltas["twin", name].verdict == "within noise"
        assert deltas["twin", name].low == deltas["twin", name].high == deltas["twin", name].delta == 0
    assert deltas["teacher", "find"].verdict == "better" and deltas["teacher", "find"].units == 8
    assert deltas["teacher", "pairs"].units == 16  # no text has a "?": the teacher embeds as the student does
    assert deltas["teacher", "pairs"].verdict == "within noise"
    assert deltas["teacher", "mean/tasks"].verdict == "better"
    assert deltas["teacher", "mean/tasks"].units == 8 + 16 + 24
    assert deltas_table(deltas.values()).num_rows == 16


def test_a_delta_of_retrieval_is_that_of_its_queries_ndcg(tmp_path: Path) -> None:
    folder = retrieval_folder(tmp_path / "find")
    right = {f"{word} is a word": np.eye(8)[index] for index, word in enumerate(WORDS)}
    # The other system finds the passage of every second query in second place.
    asked = {f"{word} what is it?": np.eye(8)[index] for index, word in enumerate(WORDS)}
    off = {text: vector + (index % 2) * 2 * np.roll(vector, 1) for index, (text, vector) in enumerate(asked.items())}
    systems = [VectorSystem(right | asked), VectorSystem(right | off, "echo")]
    tasks, runs = run([folder], systems, tmp_path / "work")
    found = task_deltas(tasks, runs, SETTINGS)[0]
    second = 1 / math.log2(3)
    by_hand = sorted((f"q-{word}", 1 if index % 2 == 0 else second) for index, word in enumerate(WORDS))
    expected = paired_delta("find", "echo", np.ones(8), [score for _, score in by_hand], SETTINGS)
    assert found.delta == pytest.approx((1 - second) / 2, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-5)


def test_without_a_student_or_the_score_in_question_there_is_no_interval(tmp_path: Path) -> None:
    folder = retrieval_folder(tmp_path / "find")
    tasks, runs = run([folder], [WordSystem(), WordSystem("teacher", shift=1)], tmp_path / "work")
    assert task_deltas(tasks, runs[1:], SETTINGS) == []
    other = task_deltas(tasks, runs, SETTINGS, "recall_at_1")
    assert {(delta.verdict, delta.units, delta.low) for delta in other} == {("no interval", 0, None)}
    assert other[0].delta > 0
    assert task_deltas(tasks, runs, SETTINGS, "ndcg_at_10") == task_deltas(tasks, runs, SETTINGS)


def test_units_that_differ_are_not_paired(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks, runs = run([sts_folder(tmp_path / "pairs")], [WordSystem(), WordSystem("echo")], tmp_path / "work")
    strangers = replace(runs[1], unit_scores=[[replace(runs[1].unit_scores[0][0], key="other")]])
    assert task_deltas(tasks, [runs[0], strangers], SETTINGS)[0].verdict == "no interval"
    assert "pairs: no interval: the systems were not measured on the same units" in caplog.text


def test_a_score_that_is_not_defined_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Constant(WordSystem):
        def encode(self, texts: Any, instruction: str, side: str = "query") -> np.ndarray:
            return np.ones((len(texts), 2), dtype=np.float32)

    folders = [sts_folder(tmp_path / "pairs"), retrieval_folder(tmp_path / "find")]
    with caplog.at_level(logging.WARNING):
        tasks, runs = run(folders, [WordSystem(), Constant("teacher")], tmp_path / "work")
        metrics = flat_metrics(summary_table(tasks, runs))
    assert "teacher/pairs" not in metrics and "teacher/mean/tasks" not in metrics and "delta/pairs" not in metrics
    assert metrics["student/mean/tasks"] == 1.0 and "delta/find" in metrics
    assert "undefined, left out: teacher/pairs" in caplog.text
    assert [delta.metric for delta in task_deltas(tasks, runs, SETTINGS)] == ["find", "type/Retrieval"]


def test_a_large_task_takes_seconds(tmp_path: Path) -> None:
    tasks, runs = run([sts_folder(tmp_path / "pairs")], [WordSystem(), WordSystem("echo")], tmp_path / "work")
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 26, 1379) / 5

    def noisy(scale: float) -> UnitScores:
        predicted = gold + rng.normal(0, scale, len(gold))
        return UnitScores("test", "default", "pair", "k", "spearman", gold, predicted)

    large = [replace(done, unit_scores=[[noisy(scale)]]) for done, scale in zip(runs, (1.0, 1.5), strict=True)]
    started = time.monotonic()
    found = task_deltas(tasks, large, SETTINGS)[0]
    assert time.monotonic() - started < 20
    assert found.units == 1379 and found.low is not None and found.high is not None
    assert 0 < found.high - found.low < 0.1
