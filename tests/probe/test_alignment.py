"""Held-out alignment by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import pipeline.probe.alignment as alignment
from pipeline.core.artifacts import create
from pipeline.core.errors import EvaluationError
from pipeline.core.schemas import targets_schema
from pipeline.probe.alignment import AlignmentParams, alignment_metrics, ranked, run
from tests.evaluate.fakes import WORDS, VectorSystem, WordSystem
from tests.probe.fakes import WIDTH, context, write_heldout


def test_ranks_and_metrics_by_hand() -> None:
    answers = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    queries = np.array([[2.0, 0.0], [1.0, 0.2], [3.0, 3.0]])
    rows = ranked("s", ["a", "b", "c"], queries, answers)
    assert rows["rank"].to_pylist() == [1, 3, 1]
    assert rows["nearest"].to_pylist() == ["a", "a", "c"]
    np.testing.assert_allclose(rows["cosine"].to_numpy(), [1.0, 0.2 / np.hypot(1, 0.2), 1.0], rtol=1e-5)
    metrics = alignment_metrics(rows)
    assert metrics["top1"] == round(2 / 3, 6)
    assert metrics["mrr"] == round((1 + 1 / 3 + 1) / 3, 6)


def test_a_constant_system_finds_nothing() -> None:
    """Ties count against: an embedder that maps everything to one point must not look perfect."""
    rows = ranked("s", ["a", "b", "c"], np.ones((3, 2)), np.ones((3, 2)))
    assert rows["rank"].to_pylist() == [3, 3, 3]


def test_a_zero_vector_is_no_error() -> None:
    rows = ranked("s", ["a", "b"], np.zeros((2, 2)), np.eye(2))
    assert rows["cosine"].to_pylist() == [0.0, 0.0]


def test_overlap_is_a_mean_of_shares_and_may_be_missing() -> None:
    vectors = np.eye(2)
    rows = ranked("s", ["a", "b"], vectors, vectors, np.array([1.0, 0.5]))
    assert alignment_metrics(rows)["overlap@10"] == 0.75
    assert alignment_metrics(ranked("s", ["a", "b"], vectors, vectors))["overlap@10"] is None


SHIFTS = {"student": 0, "teacher": 1, "untrained-1": 1, "echo": 0}


def test_run_measures_each_system_in_its_space(workspace: Path) -> None:
    write_heldout()
    right, wrong, own = WordSystem("student"), WordSystem("teacher", shift=1), WordSystem("backbone-mean")
    result = run(AlignmentParams(), context(Path(), right, wrong, own))
    assert result.metrics["candidates"] == 3
    assert result.metrics["student/cosine"] == result.metrics["student/top1"] == 1.0
    assert result.metrics["teacher/top1"] == result.metrics["teacher/cosine"] == 0.0
    assert result.metrics["backbone-mean/top1"] == 1.0
    assert right.calls == [("", ["apple what?", "bread what?", "cloud what?"])]
    assert [texts for _, texts in own.calls] == [["apple what?", "bread what?", "cloud what?"], list(WORDS[:3])]
    assert result.systems["backbone-mean"]["space"] == "its own"
    assert len(result.rows) == 9
    assert result.metrics["student/anisotropy"] == 0.0  # one-hot vectors of three words
    assert result.metrics["teacher/overlap@10"] == 1.0  # two neighbours, and there are only two others


def test_an_embedding_that_is_not_finite_is_named(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_heldout()
    system = WordSystem("student")
    encode = WordSystem.encode

    def broken(self: Any, texts: Sequence[str], *rest: Any) -> np.ndarray:
        return np.where([[text.startswith("bread")] for text in texts], np.nan, encode(self, texts, *rest))

    monkeypatch.setattr(WordSystem, "encode", broken)
    with pytest.raises(EvaluationError, match=r"student, held-out queries: 1 of 3 embeddings .* first: 'bread what\?'"):
        run(AlignmentParams(), context(Path(), system))


def test_deltas_are_paired_over_queries_and_cosines_stay_in_one_space(workspace: Path) -> None:
    write_heldout(count=8)
    result = run(AlignmentParams(), context(Path(), *[WordSystem(name, shift) for name, shift in SHIFTS.items()]))
    deltas = {(delta.metric, delta.system): delta for delta in result.deltas}
    assert {system for metric, system in deltas if metric == "cosine"} == {"teacher", "untrained-1"}
    assert {metric for metric, system in deltas if system == "echo"} == {"top1", "mrr", "overlap@10"}
    worse = deltas["cosine", "teacher"]
    assert (worse.delta, worse.low, worse.high, worse.verdict, worse.units) == (1.0, 1.0, 1.0, "better", 8)
    assert deltas["mrr", "teacher"].delta == 0.875  # the teacher's ties all rank last
    assert deltas["top1", "echo"].delta == 0.0 and deltas["top1", "echo"].verdict == "within noise"
    assert result.systems["untrained-1"]["space"] == "the teacher's"


def test_one_held_out_query_has_no_neighbours(workspace: Path) -> None:
    write_heldout(count=1)
    metrics = run(AlignmentParams(), context(Path(), WordSystem("student"))).metrics
    assert (metrics["student/overlap@10"], metrics["student/anisotropy"], metrics["student/top1"]) == (None, None, 1.0)


def test_overlap_finds_the_teachers_neighbourhoods(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets on a circle in the order of the ids; the student's queries lie so too, the other system's at random."""
    monkeypatch.setattr(alignment, "NEIGHBOURS", 2)
    angles = np.linspace(0, 3, 6)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    monkeypatch.setattr(alignment, "heldout_rows", lambda: ((), circle_rows(circle)))
    texts = [f"q{i}" for i in range(6)]
    right = VectorSystem(dict(zip(texts, circle.tolist(), strict=True)))
    mixed = VectorSystem(dict(zip(texts, circle[[0, 3, 1, 4, 2, 5]].tolist(), strict=True)), "teacher")
    result = run(AlignmentParams(), context(Path(), right, mixed))
    assert result.metrics["student/overlap@2"] == 1.0
    # Neighbours 0:{2,4} 1:{3,4} 2:{0,4} 3:{1,5} 4:{1,2} 5:{1,3} against 0:{1,2} 1:{0,2} 2:{1,3} 3:{2,4} 4:{3,5} 5:{3,4}
    assert result.metrics["teacher/overlap@2"] == round((0.5 + 0 + 0 + 0 + 0 + 0.5) / 6, 6)


def circle_rows(targets: np.ndarray) -> pa.Table:
    """Held-out rows with these targets."""
    names = [f"{i}" for i in range(len(targets))]
    column = pa.array(targets.astype(np.float32).tolist(), pa.list_(pa.float32(), targets.shape[1]))
    return pa.table({"id": names, "text": [f"q{n}" for n in names], "response": names, "embedding": column})


def test_an_encoder_of_other_targets_is_named(workspace: Path) -> None:
    write_heldout(width=5)
    with pytest.raises(EvaluationError, match="student embeds in 8 dimensions, data/targets has 5"):
        run(AlignmentParams(), context(Path(), WordSystem("student")))


def test_no_heldout_row_has_a_target(workspace: Path) -> None:
    write_heldout()
    schema = targets_schema(WIDTH, "float32")
    with create(Path("data/targets"), kind="targets", params={}) as out:
        out.write_parts([], schema)
    with pytest.raises(EvaluationError, match="held-out queries: none of 3 queries of heldout.parquet has a target"):
        run(AlignmentParams(), context(Path(), WordSystem("student")))
