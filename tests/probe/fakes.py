"""Contexts of probes around given systems, and held-out rows whose every measure is known by hand."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core.artifacts import create
from pipeline.core.schemas import QUERIES, RESPONSES, targets_schema
from pipeline.probe.base import ProbeContext
from tests.evaluate.fakes import WORDS

WIDTH = 8


def write_heldout(width: int = WIDTH, count: int = 3, teacher: dict[str, Any] | None = None) -> None:
    """`count` held-out rows: query and response begin with the same word; the target is that word's one-hot vector."""
    words = WORDS[:count]
    queries = [{"id": f"{i}", "text": f"{word} what?", "source": "t"} for i, word in enumerate(words)]
    table = pa.Table.from_pylist(queries, QUERIES)
    with create(Path("data/queries"), kind="queries", params={}) as out:
        out.write_table("train.parquet", table.slice(0, 0))
        out.write_table("heldout.parquet", table)
    responses = [
        {"id": f"{i}", "response": word, "finish_reason": "stop", "prompt_tokens": 1, "response_tokens": 1}
        for i, word in enumerate(words)
    ]
    with create(Path("data/responses"), kind="responses", params={}) as out:
        out.write_parts([pa.Table.from_pylist(responses, RESPONSES)], RESPONSES)
    schema = targets_schema(width, "float32")
    targets = [{"id": f"{i}", "embedding": np.eye(width)[i].tolist()} for i in range(count)]
    with create(Path("data/targets"), kind="targets", params={}, models={"teacher": teacher or {}}) as out:
        out.write_parts([pa.Table.from_pylist(targets, schema)], schema)


class FakeSystems:
    """Stands for `Systems` with given systems and answers."""

    def __init__(self, systems: Sequence[Any], answers: Mapping[str, str]) -> None:
        self._systems, self._answers = {system.name: system for system in systems}, answers

    def build(self, names: Sequence[str]) -> Iterator[Any]:
        return (self._systems[name] for name in names)

    def answers(self, prompts: Sequence[str]) -> list[str]:
        return [self._answers[prompt] for prompt in prompts]


def context(folder: Path, *systems: Any, answers: Mapping[str, str] | None = None) -> ProbeContext:
    """A context with these systems, in their order, and the local data sets in `folder`."""
    made: Any = FakeSystems(systems, answers or {})
    names = [system.name for system in systems]
    return ProbeContext(made, names, folder, folder / "work", dtype="float32")
