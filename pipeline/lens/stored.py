"""Soft prompts of a file, read in chunks: .npy, .safetensors (one tensor, or `soft_prompts`) or a Parquet column.

np.save("soft.npy", encoder.soft_prompts(texts))
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SourceError

COLUMN = "soft_prompts"
FORMATS = (".npy", ".safetensors", ".parquet")
OPTION = "--soft-prompts"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StoredSoftPrompts:
    """Soft prompts `[rows, tokens, hidden]` on the disk; `open_soft_prompts` makes one."""

    path: Path
    rows: int
    tokens: int
    hidden: int

    def chunks(self, rows: int) -> Iterator[Array]:
        """Float32 `[B, n, d]`, the last one shorter.

        Raises:
            SourceError: the file is damaged, or holds a value that is not finite.
        """
        start = 0
        for chunk in _READERS[self.path.suffix](self.path, rows):
            if not np.isfinite(chunk).all():
                row = start + int(np.argmin(np.isfinite(chunk).all(axis=(1, 2))))
                raise SourceError(f"{OPTION}: {self.path}: row {row} holds a value that is not finite")
            yield np.array(chunk, dtype=np.float32)  # a copy: what is mapped from the disk cannot be written to
            start += len(chunk)


def open_soft_prompts(path: Path, hidden: int) -> StoredSoftPrompts:
    """Look at a file: whether it holds soft prompts for a backbone of this hidden size.

    Raises:
        SourceError: it is missing, damaged, empty or of another shape.
    """
    if not path.is_file():
        raise SourceError(f"{OPTION}: {path} does not exist")
    if path.suffix not in FORMATS:
        raise SourceError(f"{OPTION}: unknown format '{path.suffix}' (known: {', '.join(FORMATS)})")
    rows, tokens, width = _shape(path)
    if not rows or not tokens:
        raise SourceError(f"{OPTION}: {path} holds no soft prompt")
    if width != hidden:
        raise SourceError(f"{OPTION}: {path} holds vectors of {width} dimensions, the backbone's have {hidden}")
    return StoredSoftPrompts(path, rows, tokens, width)


def _shape(path: Path) -> tuple[int, int, int]:
    first = next(_READERS[path.suffix](path, 1), np.empty((0, 0, 0)))
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows, first.shape[1], first.shape[2]
    array = _opened(path)
    return array.shape[0], array.shape[1], array.shape[2]


def _array_chunks(path: Path, rows: int) -> Iterator[Array]:
    array = _opened(path)
    for start in range(0, len(array), rows):
        yield np.asarray(array[start : start + rows])


def _opened(path: Path) -> Array:
    """The whole array, not yet read where the format can wait."""
    try:
        # Without pickles: a file from somewhere must not run code.
        array = np.load(path, mmap_mode="r", allow_pickle=False) if path.suffix == ".npy" else _tensor(path)
    except (ValueError, OSError, EOFError) as error:
        raise SourceError(f"{OPTION}: {path} is damaged or no {path.suffix[1:]} file: {error}") from None
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
        raise SourceError(
            f"{OPTION}: {path} holds {array.dtype} of shape {list(array.shape)}, expected floats [rows, tokens, hidden]"
        )
    return array


def _tensor(path: Path) -> Array:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(error) from None
    if len(tensors) != 1 and COLUMN not in tensors:
        raise ValueError(f"it holds {len(tensors)} tensors and none is called {COLUMN}")
    tensor = tensors.get(COLUMN, next(iter(tensors.values())))
    return (tensor.to(torch.float32) if tensor.is_floating_point() else tensor).numpy()


def _parquet_chunks(path: Path, rows: int) -> Iterator[Array]:
    try:
        with pq.ParquetFile(path) as file:
            if COLUMN not in file.schema_arrow.names:
                there = ", ".join(file.schema_arrow.names)
                raise SourceError(f"{OPTION}: {path}: no column '{COLUMN}' (columns there: {there})")
            for batch in file.iter_batches(rows, columns=[COLUMN]):
                yield _stacked(path, batch.column(0))
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{OPTION}: {path} is damaged or no parquet file: {error}") from None


def _stacked(path: Path, column: pa.Array) -> Array:
    try:
        found: Array = np.array(column.to_pylist(), dtype=np.float32)
    except (ValueError, TypeError):
        found = np.empty(0, dtype=np.float32)
    if found.ndim != 3:
        raise SourceError(f"{OPTION}: {path}: column '{COLUMN}' must hold lists of equally long lists of floats")
    return found


_READERS = {".npy": _array_chunks, ".safetensors": _array_chunks, ".parquet": _parquet_chunks}
