"""How many different numbers there are among any number of them, exactly and in bounded memory."""

import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.core.files import disk_errors

HELD = 2**20
"""Numbers in memory, 8 bytes each; more go to a temporary file in sorted runs."""
RANGES = 64
"""Parts of the 64-bit numbers that are counted one after another: each takes a 64th of the file's size in memory."""
_EDGES = np.linspace(-(2.0**63), 2.0**63, RANGES + 1)[1:-1].astype(np.int64)


class Distinct:
    """Counts the different ones of signed 64-bit numbers that are spread evenly, as hashes are."""

    def __init__(self) -> None:
        self.added = 0
        self._held: list[np.ndarray] = []
        self._held_count = 0
        self._file: IO[bytes] | None = None
        self._runs: list[np.ndarray] = []  # where the ranges of each begin and end, in numbers from the file's start

    def add(self, numbers: Iterable[int]) -> None:
        """Add numbers; raises WorkError if the disk is full."""
        found = np.fromiter(numbers, np.int64)
        self.added += len(found)
        self._held.append(found)
        self._held_count += len(found)
        if self._held_count >= HELD:
            self._spill()

    @property
    def count(self) -> int:
        """How many of the added numbers differ."""
        held = np.unique(np.concatenate([np.empty(0, np.int64), *self._held]))
        self._held, self._held_count = [held], len(held)
        if self._file is None:
            return len(held)
        self._spill()
        return sum(len(np.unique(np.concatenate(self._range(at)))) for at in range(RANGES))

    def _spill(self) -> None:
        """Write what is held as a sorted run without repetitions."""
        run = np.unique(np.concatenate(self._held))
        with disk_errors(Path(tempfile.gettempdir())):
            if self._file is None:
                # Without a name: it goes when it is closed, and with its process.
                self._file = tempfile.TemporaryFile()  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            start = self._file.seek(0, 2) // run.itemsize
            self._file.write(run.tobytes())
        self._runs.append(start + np.concatenate([[0], np.searchsorted(run, _EDGES), [len(run)]]))
        self._held, self._held_count = [], 0

    def _range(self, at: int) -> list[np.ndarray]:
        return [self._read(*run[at : at + 2]) for run in self._runs]

    def _read(self, start: int, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        assert self._file is not None
        self._file.seek(start * 8)
        return np.frombuffer(self._file.read((end - start) * 8), np.int64)
