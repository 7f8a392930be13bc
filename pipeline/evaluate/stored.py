"""The student's embeddings in fewer dimensions or bits: what a smaller index costs, from the embeddings at hand.

A stored form is a system around the student behind its cache, so no text is embedded again. The ranges of int8 are
those of all texts of a task, queries and documents, as of a user who stores a corpus and knows it: a first pass over
the task finds them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pipeline.core.bootstrap import Delta, Verdict
from pipeline.encoder.storage import Storage, ranges_of
from pipeline.evaluate.comparison import metrics_of
from pipeline.evaluate.system import System
from pipeline.tasks.instructions import Side

VERSION = 2  # raise it when the same embeddings are stored or compared otherwise
STUDENT = "student"
MILLION = 1_000_000
_OPPOSITE: dict[Verdict, Verdict] = {"better": "worse", "worse": "better"}


class StoredSystem:
    """A `System` around another whose embeddings it stores in fewer dimensions or bits, and compares so."""

    def __init__(self, system: System, storage: Storage) -> None:
        self.system, self.storage, self.name = system, storage, name_of(storage)
        self._ranges: np.ndarray | None = None
        self._seen: list[np.ndarray] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.system.identity, "stored": {"version": VERSION, **asdict(self.storage)}}

    @property
    def prompting(self) -> str:
        return self.system.prompting

    @property
    def embeddings_dtype(self) -> str:
        """What embeddings are rounded to before; scores with another one are others."""
        return getattr(self.system, "embeddings_dtype", "float32")

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        return self.system.cache_key(text, instruction, side)

    def calibrate(self, read: Callable[[], object]) -> None:
        """Fix the ranges of int8 to those of all texts that `read` has this system encode."""
        if self.storage.quantize != "int8":
            return
        self._seen = []
        read()
        self._ranges, self._seen = ranges_of(self._seen), None

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        """Float32 vectors that can be had of the stored ones; while `calibrate` reads, before quantisation."""
        vectors = self.system.encode(texts, instruction, side)
        if self._seen is None:
            return self.storage.compared(vectors, self._ranges)
        truncated = self.storage.truncated(vectors)
        if len(truncated):
            self._seen.append(ranges_of([truncated]))
        return truncated


def name_of(storage: Storage) -> str:
    """The system's name: `student-96`, `student-int8`, `student-96-binary`."""
    return "-".join(str(part) for part in (STUDENT, storage.truncate_dim, storage.quantize) if part is not None)


def with_stored(systems: Iterable[System], storages: Sequence[Storage]) -> Iterator[System]:
    """The systems, and behind the student its stored forms while its embeddings are open."""
    for system in systems:
        yield system
        if system.name == STUDENT:
            for storage in storages:
                yield StoredSystem(system, storage)
        del system  # frees its memory before the next one is loaded


def stored_facts(
    storages: Sequence[Storage], width: int, metrics: Mapping[str, float], deltas: Sequence[Delta]
) -> list[dict[str, Any]]:
    """The student of `width` dimensions and its stored forms, for the record of a suite.

    `metrics` are flat ones and `deltas` student minus stored form, in the record stored form minus student; bytes are
    those of a million vectors.
    """
    return [
        {
            "stored": storage.quantize or "float32",
            "dimensions": storage.truncate_dim or width,
            "bytes_per_million": storage.bytes(width) * MILLION,
            "scores": metrics_of(name_of(storage), metrics),
            "deltas": [asdict(_turned(delta)) for delta in deltas if delta.system == name_of(storage)],
        }
        for storage in [Storage(), *storages]
    ]


def _turned(delta: Delta) -> Delta:
    """The difference from the other side."""
    low, high = (None if end is None else 0.0 - end for end in (delta.high, delta.low))
    return replace(
        delta, delta=0.0 - delta.delta, low=low, high=high, verdict=_OPPOSITE.get(delta.verdict, delta.verdict)
    )
