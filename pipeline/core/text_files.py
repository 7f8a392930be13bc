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
    """The texts of a file in their order; `open_texts` makes one. `column` is None for .txt."""

    path: Path
    column: str | None
    rows: int

    def __iter__(self) -> Iterator[str]:
        """Texts, normalised as the pipeline's queries are; raises SourceError if the file is damaged."""
        raw = _lines(self.path) if self.column is None else _values(self.path, self.column)
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


def open_texts(path: Path, column: str | None = None) -> TextFile:
    """Look through a file once: whether its texts can be read, and how many there are.

    Args:
        path: .txt (one a line), .jsonl, .ndjson, .csv or .parquet.
        column: of the texts; None = "text". Not for .txt.

    Raises:
        SourceError: the file or column is missing, damaged or empty, or the column holds something else than texts.
    """
    if not path.is_file():
        raise SourceError(f"{path} does not exist", argument="path")
    if path.suffix == ".txt":
        file = TextFile(path, None, sum(1 for _ in _lines(path)))
    else:
        chosen = column or DEFAULT_COLUMN
        file = TextFile(path, chosen, _checked_rows(path, chosen))
    if not file.rows:
        raise SourceError(f"{path} holds no text", argument="path")
    return file


def check_not_read(output: Path, read: Path | None) -> None:
    """Raises SourceError if an output, by whatever path or link, is the very file (or folder) that is read."""
    if read is not None and output.exists() and read.exists() and output.samefile(read):
        raise SourceError(f"{output} is read itself and would be lost: give another name", argument="output")


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            yield line.removesuffix("\n")


def _checked_rows(path: Path, column: str) -> int:
    if path.suffix not in _SCANS:
        raise SourceError(f"unknown format '{path.suffix}' (known: .txt, {', '.join(_SCANS)})", argument="path")
    with _damage(path):
        table = _SCANS[path.suffix](path)
        schema = table.collect_schema()
        if column not in schema:
            there = ", ".join(schema) or "none"
            raise SourceError(f"{path} has no column '{column}' (columns there: {there})", argument="column")
        if schema[column] != pl.String:
            raise SourceError(f"{path}: '{column}' holds {schema[column]}, expected texts", argument="column")
    rows = nulls = first = 0
    for row, value in enumerate(_values(path, column)):
        rows += 1
        if value is None:
            first = first if nulls else row
            nulls += 1
    if nulls:
        raise SourceError(f"{path}: '{column}' is null in {nulls} rows, first in row {first}", argument="column")
    return rows


def _values(path: Path, column: str) -> Iterator[str | None]:
    read = {".csv": _csv_values, ".parquet": _parquet_values}.get(path.suffix, _json_values)
    with _damage(path):
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
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, pa.ArrowException, csv.Error, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is damaged or no {path.suffix[1:]} file: {error}", argument="path") from None
