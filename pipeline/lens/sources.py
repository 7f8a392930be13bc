"""What `decode` reads: texts, a file of texts (with their real responses), or stored soft prompts.

Stored soft prompts `[N, n, d]` lie in .npy, .safetensors (one tensor, or `soft_prompts`) or a Parquet column.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import SourceError
from pipeline.core.files import bytes_sha256
from pipeline.core.readers import TextFile, check_encodable
from pipeline.core.text import normalize_text, query_id
from pipeline.lens.reading import Entries

COLUMN = "soft_prompts"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StoredSoftPrompts:
    """Soft prompts `[rows, tokens, hidden]` on disk, made by `open_soft_prompts`."""

    path: Path
    rows: int
    tokens: int
    hidden: int

    def chunks(self, rows: int) -> Iterator[Array]:
        """Float32 `[B, n, d]`; raises SourceError if the file is damaged, or a value is not finite."""
        start = 0
        for chunk in _READERS[self.path.suffix](self.path, rows):
            if not np.isfinite(chunk).all():
                row = start + int(np.argmin(np.isfinite(chunk).all(axis=(1, 2))))
                raise _unusable(self.path, f"holds a value in row {row} that is not finite")
            yield np.array(chunk, dtype=np.float32)  # a copy: what is mapped from the disk cannot be written to
            start += len(chunk)


def open_soft_prompts(path: Path, hidden: int) -> StoredSoftPrompts:
    """Check that a file holds soft prompts for a backbone of this hidden size.

    Raises SourceError if it is missing, damaged, empty or has another shape.
    """
    if not path.is_file():
        raise _unusable(path, "does not exist")
    if path.suffix not in _READERS:
        raise _unusable(path, f"has an unknown format (known: {', '.join(_READERS)})")
    rows, tokens, width = _shape(path)
    if not rows or not tokens:
        raise _unusable(path, "holds no soft prompt")
    if width != hidden:
        raise _unusable(path, f"holds vectors of {width} dimensions, the backbone's have {hidden}")
    return StoredSoftPrompts(path, rows, tokens, width)


def _unusable(path: Path, problem: str) -> SourceError:
    return SourceError(f"{path} {problem}", argument="soft_prompts")


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
    """The whole array; .npy is mapped, not read."""
    try:
        # A pickle could run code.
        array = np.load(path, mmap_mode="r", allow_pickle=False) if path.suffix == ".npy" else _tensor(path)
    except (ValueError, OSError, EOFError) as error:
        raise _unusable(path, f"is damaged or no {path.suffix[1:]} file: {error}") from None
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating):
        found = f"{array.dtype} of shape {list(array.shape)}"
        raise _unusable(path, f"holds {found}, expected floats [rows, tokens, hidden]")
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
                raise _unusable(path, f"has no column '{COLUMN}' (but {', '.join(file.schema_arrow.names)})")
            for batch in file.iter_batches(rows, columns=[COLUMN]):
                yield _stacked(path, batch.column(0))
    except (pa.ArrowException, OSError) as error:
        raise _unusable(path, f"is damaged or no {path.suffix[1:]} file: {error}") from None


def _stacked(path: Path, column: pa.Array) -> Array:
    try:
        found: Array = np.array(column.to_pylist(), dtype=np.float32)
    except (ValueError, TypeError):
        found = np.empty(0, dtype=np.float32)
    if found.ndim != 3:
        raise _unusable(path, f"must hold lists of equally long lists of floats in column '{COLUMN}'")
    return found


_READERS = {".npy": _array_chunks, ".safetensors": _array_chunks, ".parquet": _parquet_chunks}


class Chunk(NamedTuple):
    """B rows; `soft_prompts` float32 `[B, n, d]` if they are stored, else the encoder makes them of the queries."""

    entries: Entries
    soft_prompts: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True)
class Source:
    """Rows to read, by `chunks` of a given size, the last one shorter; `tokens`: n of stored soft prompts."""

    name: str
    rows: int
    chunks: Callable[[int], Iterator[Chunk]]
    tokens: int | None = None


def from_texts(texts: Sequence[str], *, tidy: bool = False) -> Source:
    """Texts as they stand, or normalised; raises SourceError of one that cannot be written as UTF-8."""
    given = [normalize_text(text) if tidy else text for text in texts]
    for number, text in enumerate(given, start=1):
        check_encodable(text, f"text {number}")

    def chunks(rows: int) -> Iterator[Chunk]:
        return (_entries(given[start : start + rows]) for start in range(0, len(given), rows))

    return Source("texts", len(given), chunks)


def from_file(texts: TextFile, responses: TextFile | None = None) -> Source:
    """Texts of a file, with the real responses from another column.

    Raises SourceError if the columns differ in length.
    """
    if responses is not None and responses.rows != texts.rows:
        counts = f"{responses.rows} responses for {texts.rows} texts of {texts.path}"
        raise SourceError(counts, argument="responses")

    def chunks(rows: int) -> Iterator[Chunk]:
        real: Iterator[list[str] | None] = repeat(None) if responses is None else responses.chunks(rows)
        for chunk, chunk_responses in zip(texts.chunks(rows), real, strict=False):
            yield _entries(chunk, chunk_responses)

    return Source(texts.path.name, texts.rows, chunks)


def _entries(texts: list[str], responses: Sequence[str] | None = None) -> Chunk:
    return Chunk(Entries([query_id(text) for text in texts], texts, responses or [None] * len(texts)))


def from_soft_prompts(stored: StoredSoftPrompts) -> Source:
    """Stored soft prompts, whose texts are unknown."""

    def chunks(rows: int) -> Iterator[Chunk]:
        for chunk in stored.chunks(rows):
            unknown = [None] * len(chunk)
            yield Chunk(Entries([bytes_sha256(row.tobytes())[:32] for row in chunk], unknown, unknown), chunk)

    return Source(stored.path.name, stored.rows, chunks, stored.tokens)
