"""Columns of training rows on the disk, read by row: memory holds a few bytes a row, whatever a row is.

The files have no name and go with their process. They are read and not mapped: the system counts mapped pages as the
process's memory until it wants them back.
"""

import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from pipeline.core.files import disk_errors


class _File:
    """Bytes that are appended, then read from anywhere."""

    def __init__(self, folder: Path) -> None:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=folder, prefix="rows-")
            Path(name).unlink()
        self._file, self._folder = os.fdopen(descriptor, "r+b", buffering=0), folder
        weakref.finalize(self, self._file.close)

    def append(self, array: np.ndarray[Any, Any]) -> None:
        """Raises WorkError if the disk is full."""
        content = array.tobytes()
        with disk_errors(self._folder):
            while content:
                content = content[self._file.write(content) :]

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)


class TokenRows(Sequence[list[int]]):
    """Token ids of N rows, four bytes each."""

    def __init__(self, folder: Path) -> None:
        self._file = _File(folder)
        self._lengths: list[np.ndarray[Any, Any]] = [np.zeros(0, np.int32)]
        self._ends: np.ndarray[Any, Any] | None = None

    def append(self, rows: Sequence[Sequence[int]]) -> None:
        """Add rows; raises WorkError if the disk is full."""
        self._file.append(np.array([token for row in rows for token in row], np.int32))
        self._lengths.append(np.array([len(row) for row in rows], np.int32))
        self._ends = None

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each row, int32 [N]."""
        if len(self._lengths) > 1:
            self._lengths = [np.concatenate(self._lengths)]
        return self._lengths[0]

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[int]]: ...
    def __getitem__(self, row: int | slice) -> list[int] | list[list[int]]:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        if self._ends is None:
            self._ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        start, end = self._ends[row], self._ends[row + 1]
        content = self._file.read(int(start) * 4, int(end - start) * 4)
        return [int(token) for token in np.frombuffer(content, np.int32)]


class VectorRows:
    """Vectors [N, e], kept in the type that they are added in and read as float32."""

    def __init__(self, folder: Path) -> None:
        self._file = _File(folder)
        self._dtype = np.dtype(np.float32)
        self.shape = (0, 0)

    def append(self, vectors: np.ndarray[Any, Any]) -> None:
        """Add vectors [B, e]; raises WorkError if the disk is full."""
        self._dtype = vectors.dtype
        self.shape = (self.shape[0] + len(vectors), vectors.shape[1])
        self._file.append(vectors)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Sequence[int] | slice) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The vectors of these rows, float32 [B, e]."""
        chosen = range(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        size = self.shape[1] * self._dtype.itemsize
        found = np.empty((len(chosen), self.shape[1]), np.float32)
        for at, row in enumerate(chosen):
            found[at] = np.frombuffer(self._file.read(int(row) * size, size), self._dtype)
        return found


class SpanRows(Sequence[slice]):
    """Spans of N rows, eight bytes each in memory."""

    def __init__(self) -> None:
        self._ends: list[np.ndarray[Any, Any]] = [np.zeros((0, 2), np.int32)]

    def append(self, spans: Sequence[slice]) -> None:
        self._ends.append(np.array([(span.start, span.stop) for span in spans], np.int32).reshape(-1, 2))

    @property
    def _all(self) -> np.ndarray[Any, Any]:
        if len(self._ends) > 1:
            self._ends = [np.concatenate(self._ends)]
        return self._ends[0]

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, row: int) -> slice: ...
    @overload
    def __getitem__(self, row: slice) -> list[slice]: ...
    def __getitem__(self, row: int | slice) -> slice | list[slice]:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        start, stop = self._all[row]
        return slice(int(start), int(stop))


class TextRows(Sequence[str]):
    """Texts as one column, without an object a text."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column.combine_chunks()

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        found = self._column[row]
        return found.to_pylist() if isinstance(row, slice) else str(found.as_py())
