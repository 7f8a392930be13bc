"""What is to be read: texts, a file of texts (with the real responses beside them), or stored soft prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.artifacts import bytes_sha256
from pipeline.core.errors import ParamsError, SourceError
from pipeline.core.text import normalize_text, query_id
from pipeline.core.text_files import TextFile, check_not_read, open_texts
from pipeline.lens.reading import Entries

# Soft prompts of a file, read in chunks: .npy, .safetensors (one tensor, or `soft_prompts`) or a Parquet column.
#
# np.save("soft.npy", encoder.soft_prompts(texts))

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


class Chunk(NamedTuple):
    """Rows read together; `soft_prompts` float32 `[B, n, d]` where they are stored, else made of the queries."""

    entries: Entries
    soft_prompts: np.ndarray[Any, Any] | None = None


@dataclass(frozen=True)
class Source:
    """Rows to read.

    Attributes:
        name: in titles and messages.
        rows: how many.
        chunks: of so many rows, the last one shorter.
        tokens: of a soft prompt, where they are stored.
    """

    name: str
    rows: int
    chunks: Callable[[int], Iterator[Chunk]]
    tokens: int | None = None


def listed(texts: Sequence[str]) -> Source:
    """Texts at hand."""
    tidy = [normalize_text(text) for text in texts]

    def chunks(rows: int) -> Iterator[Chunk]:
        return (_entries(tidy[start : start + rows]) for start in range(0, len(tidy), rows))

    return Source("texts", len(tidy), chunks)


def from_file(texts: TextFile, responses: TextFile | None = None) -> Source:
    """Texts of a file, with the real responses of another column, row by row.

    Raises:
        SourceError: the two have not as many rows.
    """
    if responses is not None and responses.rows != texts.rows:
        raise SourceError(f"{responses.option}: {responses.rows} responses for {texts.rows} texts of {texts.path}")

    def chunks(rows: int) -> Iterator[Chunk]:
        real: Iterator[list[str] | None] = repeat(None) if responses is None else responses.chunks(rows)
        for some, beside in zip(texts.chunks(rows), real, strict=False):
            yield _entries(some, beside)

    return Source(texts.path.name, texts.rows, chunks)


def _entries(texts: list[str], responses: Sequence[str] | None = None) -> Chunk:
    return Chunk(Entries([query_id(text) for text in texts], texts, responses or [None] * len(texts)))


def from_soft_prompts(stored: StoredSoftPrompts) -> Source:
    """Stored soft prompts, of whatever text they were made."""

    def chunks(rows: int) -> Iterator[Chunk]:
        for some in stored.chunks(rows):
            nothing = [None] * len(some)
            yield Chunk(Entries([bytes_sha256(row.tobytes())[:32] for row in some], nothing, nothing), some)

    return Source(stored.path.name, stored.rows, chunks, stored.tokens)


def check_options(
    texts: Sequence[str] | None,
    file: Path | None,
    soft_prompts: Path | None,
    output: Path | None,
    page: Path | None,
    response_column: str | None,
    corpus: Path | None,
    faithfulness: bool,
) -> None:
    """Raises ParamsError unless the options of `decode` go together, SourceError if a file to read would be lost."""
    given = {"TEXT": bool(texts), "--input": file is not None, "--soft-prompts": soft_prompts is not None}
    named = [name for name, there in given.items() if there]
    if len(named) != 1:
        raise ParamsError(f"decode: {' and '.join(named) or 'nothing'} given: give one of {', '.join(given)}")
    for option, path, suffix in (("--output", output, ".parquet"), ("--html", page, ".html")):
        if path is not None and path.suffix != suffix:
            raise ParamsError(f"{option}: {path} must end in {suffix}")
        for read_option, read in (("--input", file), ("--soft-prompts", soft_prompts), ("--corpus", corpus)):
            if path is not None:
                check_not_read(option, path, read_option, read)
    for option, there in (("--html", page), ("--corpus", corpus), ("--faithfulness", faithfulness)):
        if there and output is None:
            raise ParamsError(f"{option}: needs --output too, into whose rows it goes")
    if response_column is not None and (file is None or file.suffix == ".txt"):
        raise ParamsError("--response-column: needs an --input with columns (.jsonl, .csv or .parquet)")


def open_source(
    texts: Sequence[str] | None,
    file: Path | None,
    soft_prompts: Path | None,
    *,
    hidden: Callable[[], int],
    column: str | None = None,
    response_column: str | None = None,
) -> Source:
    """What the options of `decode` name, looked through once.

    Args:
        texts: as they stand on the command line.
        file: of texts.
        soft_prompts: file of stored ones.
        hidden: hidden size of the backbone, asked for soft prompts.
        column: of the texts in `file`.
        response_column: of the real responses in `file`.

    Raises:
        SourceError: a file is missing, damaged or empty.
    """
    if file is not None:
        responses = None if response_column is None else open_texts(file, response_column, "--response-column")
        return from_file(open_texts(file, column), responses)
    if soft_prompts is not None:
        return from_soft_prompts(open_soft_prompts(soft_prompts, hidden()))
    return listed(texts or [])
