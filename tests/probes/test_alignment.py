"""Held-out alignment by hand."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline import contracts
from pipeline.artifacts import create
from pipeline.errors import EvaluationError
from pipeline.probes.alignment import AlignmentParams, alignment_metrics, ranked, run
from pipeline.probes.base import ProbeContext
from tests.evaluation_fakes import WORDS, WordSystem


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


WIDTH = 8


def write_heldout(width: int = WIDTH) -> None:
    """Three held-out rows: query and response begin with the same word; the target is that word's one-hot vector."""
    words = WORDS[:3]
    queries = [{"id": f"{i}", "text": f"{word} what?", "source": "t"} for i, word in enumerate(words)]
    table = pa.Table.from_pylist(queries, contracts.QUERIES)
    with create(Path("data/queries"), kind="queries", params={}) as out:
        out.write_table("train.parquet", table.slice(0, 0))
        out.write_table("heldout.parquet", table)
    responses = [
        {"id": f"{i}", "response": word, "finish_reason": "stop", "prompt_tokens": 1, "response_tokens": 1}
        for i, word in enumerate(words)
    ]
    with create(Path("data/responses"), kind="responses", params={}) as out:
        out.write_parts([pa.Table.from_pylist(responses, contracts.RESPONSES)], contracts.RESPONSES)
    schema = contracts.targets_schema(width, "float32")
    targets = [{"id": f"{i}", "embedding": np.eye(width)[i].tolist()} for i in range(3)]
    with create(Path("data/targets"), kind="targets", params={}) as out:
        out.write_parts([pa.Table.from_pylist(targets, schema)], schema)


class Fakes:
    """The systems of a probe, made beforehand."""

    def __init__(self, *systems: WordSystem) -> None:
        self._systems = {system.name: system for system in systems}

    def build(self, names: Sequence[str]) -> Iterator[WordSystem]:
        return (self._systems[name] for name in names)


def context(*systems: WordSystem) -> Any:
    names = [system.name for system in systems]
    return ProbeContext(Fakes(*systems), names, Path(), Path(), 4, "float32")  # type: ignore[arg-type]


def test_run_measures_each_system_in_its_space(workspace: Path) -> None:
    write_heldout()
    right, wrong, own = WordSystem("student"), WordSystem("teacher", shift=1), WordSystem("backbone-mean")
    result = run(AlignmentParams(), context(right, wrong, own))
    assert result.metrics["candidates"] == 3
    assert result.metrics["student/cosine"] == result.metrics["student/top1"] == 1.0
    assert result.metrics["teacher/top1"] == result.metrics["teacher/cosine"] == 0.0
    assert result.metrics["backbone-mean/top1"] == 1.0
    assert right.calls == [("", ["apple what?", "bread what?", "cloud what?"])]
    assert [texts for _, texts in own.calls] == [["apple what?", "bread what?", "cloud what?"], list(WORDS[:3])]
    assert result.systems["backbone-mean"]["space"] == "its own"
    assert len(result.rows) == 9


def test_an_encoder_of_other_targets_is_named(workspace: Path) -> None:
    write_heldout(width=5)
    with pytest.raises(EvaluationError, match="student embeds in 8 dimensions, data/targets has 5"):
        run(AlignmentParams(), context(WordSystem("student")))


def test_no_heldout_row_has_a_target(workspace: Path) -> None:
    write_heldout()
    schema = contracts.targets_schema(WIDTH, "float32")
    with create(Path("data/targets"), kind="targets", params={}) as out:
        out.write_parts([], schema)
    with pytest.raises(EvaluationError, match="held-out queries: none of 3 queries has a target"):
        run(AlignmentParams(), context(WordSystem("student")))
