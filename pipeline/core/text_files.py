"""Texts of a user's file, of any size: read in chunks, checked before anything else is loaded."""

import csv
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import SourceError
from pipeline.core.text import normalize_text

DEFAULT_COLUMN = "text"
READ_ROWS = 4096
_SCANS: dict[str, Any] = {
    ".jsonl": pl.scan_ndjson,
    ".ndjson": pl.scan_ndjson,
    ".csv": pl.scan_csv,
    ".parquet": pl.scan_parquet,
}


@dataclass(frozen=True)
class TextFile:
    """The texts of a file in their order; `open_texts` makes one.

    Attributes:
        path: of the file.
        column: of the texts; None for .txt.
        rows: how many texts there are.
        option: the command line's name of the file, for messages.
    """

    path: Path
    column: str | None
    rows: int
    option: str = "--input"

    def __iter__(self) -> Iterator[str]:
        """Texts, normalised as the pipeline's queries are.

        Raises:
            SourceError: the file is damaged.
        """
        raw = _lines(self.path) if self.column is None else _values(self.path, self.column, self.option)
        # None: a null that came after the file was looked through; whoever goes by its rows will notice.
        return (normalize_text(text or "") for text in raw)

    def chunks(self, rows: int) -> Iterator[list[str]]:
        """The texts in lists of `rows`, the last one shorter. See `__iter__`."""
        chunk: list[str] = []
        for text in self:
            chunk.append(text)
            if len(chunk) == rows:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def open_texts(path: Path, column: str | None = None, option: str = "--input") -> TextFile:
    """Look through a file once: whether its texts can be read, and how many there are.

    Args:
        path: .txt (one a line), .jsonl, .ndjson, .csv or .parquet.
        column: of the texts; None = "text". Not for .txt.
        option: the command line's name of the file, for messages.

    Raises:
        SourceError: the file or column is missing, damaged or empty, or the column holds something else than texts.
    """
    if not path.is_file():
        raise SourceError(f"{option}: {path} does not exist")
    if path.suffix == ".txt":
        file = TextFile(path, None, sum(1 for _ in _lines(path)), option)
    else:
        chosen = column or DEFAULT_COLUMN
        file = TextFile(path, chosen, _checked_rows(path, chosen, option), option)
    if not file.rows:
        raise SourceError(f"{option}: {path} holds no text")
    return file


def check_not_read(option: str, output: Path, read_option: str, read: Path | None) -> None:
    """Raises SourceError if an output, by whatever path or link, is the very file (or folder) that is read."""
    if read is not None and output.exists() and read.exists() and output.samefile(read):
        raise SourceError(f"{option}: {output} is {read_option} itself, which would be lost: give another name")


def read_texts(path: Path, column: str | None = None, option: str = "--input") -> list[str]:
    """All texts of a file at once. See `open_texts`."""
    return list(open_texts(path, column, option))


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            yield line.removesuffix("\n")


def _checked_rows(path: Path, column: str, option: str) -> int:
    if path.suffix not in _SCANS:
        raise SourceError(f"{option}: unknown format '{path.suffix}' (known: .txt, {', '.join(_SCANS)})")
    with _damage(path, option):
        table = _SCANS[path.suffix](path)
        schema = table.collect_schema()
        if column not in schema:
            there = ", ".join(schema) or "none"
            raise SourceError(
                f"{option}: {path}: no column '{column}' (columns there: {there}); choose one with --column"
            )
        if schema[column] != pl.String:
            raise SourceError(f"{option}: {path}: column '{column}' holds {schema[column]}, expected texts")
    rows = nulls = first = 0
    for row, value in enumerate(_values(path, column, option)):
        rows += 1
        if value is None:
            first = first if nulls else row
            nulls += 1
    if nulls:
        raise SourceError(f"{option}: {path}: column '{column}' is null in {nulls} rows, first in row {first}")
    return rows


def _values(path: Path, column: str, option: str) -> Iterator[str | None]:
    read = {".csv": _csv_values, ".parquet": _parquet_values}.get(path.suffix, _json_values)
    with _damage(path, option):
        yield from read(path, column)


def _json_values(path: Path, column: str) -> Iterator[str | None]:
    for batch in pl.scan_ndjson(path).select(column).collect_batches(chunk_size=READ_ROWS, maintain_order=True):
        yield from batch[column].to_list()


# polars reads a whole CSV file, and row groups of Parquet ahead of what is asked for.
def _csv_values(path: Path, column: str) -> Iterator[str | None]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        place = header.index(column)
        for row in rows:
            if row and len(row) != len(header):
                raise csv.Error(f"line {rows.line_num} has {len(row)} fields, the header {len(header)}")
            if row:
                yield row[place]


def _parquet_values(path: Path, column: str) -> Iterator[str | None]:
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(READ_ROWS, columns=[column]):
            yield from batch.column(0).to_pylist()


@contextmanager
def _damage(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, pa.ArrowException, csv.Error, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{option}: {path} is damaged or no {path.suffix[1:]} file: {error}") from None
