"""What is to be read: texts, a file of texts (with the real responses beside them), or stored soft prompts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.artifacts import bytes_sha256
from pipeline.errors import ParamsError, SourceError
from pipeline.lens.reading import Entries
from pipeline.lens.stored import StoredSoftPrompts, open_soft_prompts
from pipeline.queries import normalize_text, query_id
from pipeline.text_files import TextFile, check_not_read, open_texts


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
