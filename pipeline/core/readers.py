"""Files and hub data sets read as texts or tables: queries, texts to embed, local data sets.

Formats: .parquet, .jsonl/.ndjson/.json (one object a line), .csv, .tsv, .txt (one text a line, UTF-8). A file is
streamed, and an error names the file and its line or row. A column holds texts, or chats: lists of messages,
`{role, content}` or `{from, value}`, of which the first user turn is the text. A chat without one is an empty text.
"""

import contextlib
import csv
import itertools
import json
import re
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.core.config import Params
from pipeline.core.errors import SourceError
from pipeline.core.text import normalize_text

READ_ROWS = 4096
DEFAULT_COLUMN = "text"
_COMMIT = re.compile("[0-9a-f]{40}")
_NUMBER = re.compile(r"\s*[-+]?\d[\d.]*(e[-+]?\d+)?\s*", re.IGNORECASE)
_USER_ROLES = ("user", "human", "prompter")

# Of each row its place (line from 1, or row of a Parquet file or hub data set from 0) and its value.
Values = Iterator[tuple[int, Any]]


class LocalSource(Params):
    """A file of queries; its suffix says the format."""

    kind: Literal["local"]
    path: str = Field(description="relative to local_dir")
    column: str | None = Field(default=None, description="null: text; a .txt file has no columns")
    limit: int | None = Field(default=None, ge=1, description="read the first rows only")
    weight: float | None = Field(default=None, gt=0, description="its share of the sample; for all sources or none")

    @property
    def label(self) -> str:
        """Its name in the column `source`."""
        return self.path


class HubSource(Params):
    """A data set of the Hugging Face hub, streamed: no row waits for the download of all, and none is stored twice."""

    kind: Literal["hub"]
    name: str
    column: str
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(default=None, description="commit on the hub; pin it")
    limit: int | None = Field(default=None, ge=1, description="read the first rows only")
    weight: float | None = Field(default=None, gt=0, description="its share of the sample; for all sources or none")

    @property
    def label(self) -> str:
        """Its name in the column `source`."""
        return f"{self.name}/{self.config}" if self.config else self.name


Source = Annotated[LocalSource | HubSource, Field(discriminator="kind")]


def read_texts(source: LocalSource | HubSource, local_dir: Path) -> Iterator[str]:
    """The raw texts of a source, in its order, at most `source.limit` of them; a null is an empty text.

    Raises:
        SourceError: the file, data set or column is missing, damaged or holds something else than texts and chats.
    """
    if isinstance(source, HubSource):
        texts = _texts(_hub_values(source), f"data set {source.label}, row")
    else:
        path = local_dir / source.path
        texts = _file_texts(path, _column(path, source.column))
    return (text or "" for _, text in itertools.islice(texts, source.limit))


@dataclass(frozen=True)
class TextFile:
    """The texts of a file in their order; `open_texts` makes one.

    Attributes:
        column: of the texts; None for .txt.
        rows: how many texts there are.
    """

    path: Path
    column: str | None
    rows: int

    def __iter__(self) -> Iterator[str]:
        """Texts, normalised as the pipeline's queries are.

        Raises:
            SourceError: the file is damaged.
        """
        # None: a null that came after the file was checked; whoever goes by its rows will notice.
        return (normalize_text(text or "") for _, text in _file_texts(self.path, self.column))

    def chunks(self, rows: int) -> Iterator[list[str]]:
        """The texts in lists of `rows`, the last one shorter. See `__iter__`."""
        texts = iter(self)
        while chunk := list(itertools.islice(texts, rows)):
            yield chunk


def open_texts(path: Path, column: str | None = None) -> TextFile:
    """Read through a file once, to check its texts and to count them; `column` is "text" by default, not for .txt.

    Raises:
        SourceError: the file or column is missing, damaged or empty, has nulls or holds something else than texts.
    """
    column = _column(path, column)
    rows, nulls = 0, list[int]()
    for place, text in _file_texts(path, column):
        rows += 1
        if text is None:
            nulls.append(place)
    if nulls:
        raise SourceError(
            f"{path}: column '{column}' is null in {len(nulls)} rows, first in {_unit(path)} {nulls[0]}",
            argument="column",
        )
    if not rows:
        raise SourceError(f"{path} holds no text", argument="path")
    return TextFile(path, column, rows)


def check_not_read(output: Path, read: Path | None) -> None:
    """Raises SourceError if an output, by whatever path or link, is the very file (or folder) that is read."""
    if read is not None and output.exists() and read.exists() and output.samefile(read):
        raise SourceError(f"{output} is read itself and would be lost: give another name", argument="output")


def read_table(path: Path) -> pa.Table:
    """All columns of a file; .txt is one column `text`. Numbers of CSV files are read as numbers.

    Raises:
        SourceError: the file is missing, damaged or of an unknown format.
    """
    with _damage(path):
        return _scan(path).collect().to_arrow()


def read_batches(path: Path, rows: int, *, without: Collection[str] = ()) -> Iterator[dict[str, list[Any]]]:
    """The values of `read_table` by column, `rows` rows at a time, without some columns. Raises as `read_table`."""
    with _damage(path):
        table = _scan(path)
        columns = [name for name in table.collect_schema().names() if name not in without]
        for batch in table.select(columns).collect_batches(chunk_size=rows) if columns else ():
            yield batch.to_dict(as_series=False)


def _file_texts(path: Path, column: str | None) -> Iterator[tuple[int, str | None]]:
    return _texts(_FORMATS[path.suffix](path, column), f"{path}, {_unit(path)}")


def _texts(values: Values, where: str) -> Iterator[tuple[int, str | None]]:
    for place, value in values:
        try:
            text = _text_of(value)
        except ValueError as error:
            raise SourceError(f"{where} {place}: {error}", argument="column") from None
        yield place, text


def _text_of(value: Any) -> str | None:
    match value:
        case None | str():
            return value
        case [*messages]:
            return next((text for message in messages if (text := _user_text(message)) is not None), "")
    raise ValueError(f"found {type(value).__name__} {str(value)[:40]!r}, expected a text or a list of messages")


def _user_text(message: Any) -> str | None:
    """The text of a message if the user wrote it."""
    if not isinstance(message, dict) or not message.keys() & {"role", "from"}:
        raise ValueError(f"a message must have 'role' and 'content', or 'from' and 'value', not {message!r:.80}")
    if (message.get("role") or message.get("from")) not in _USER_ROLES:
        return None
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # a multimodal message
        return "\n".join(part["text"] for part in content if isinstance(part, dict) and part.get("text"))
    return _text_of(content) or ""


def _column(path: Path, column: str | None) -> str | None:
    """The column to read of a file that is there; None for .txt."""
    _check_file(path)
    if path.suffix != ".txt":
        return column or DEFAULT_COLUMN
    if column is not None:
        raise SourceError(f"{path}: a .txt file has no columns: leave out '{column}'", argument="column")
    return None


def _check_file(path: Path) -> None:
    if path.suffix not in _FORMATS:
        raise SourceError(f"{path}: unknown format '{path.suffix}' (known: {', '.join(_FORMATS)})", argument="path")
    if not path.is_file():
        raise SourceError(f"{path} does not exist", argument="path")


def _unit(path: Path) -> str:
    return "row" if path.suffix == ".parquet" else "line"


def _missing_column(where: object, column: str | None, columns: Iterable[str]) -> SourceError:
    message = f"{where}: no column '{column}' (columns there: {', '.join(columns) or 'none'})"
    return SourceError(message, argument="column")


def _parquet_values(path: Path, column: str | None) -> Values:
    with _damage(path), pq.ParquetFile(path, pre_buffer=False) as file:  # which would hold a whole row group
        if column not in file.schema_arrow.names:
            raise _missing_column(path, column, file.schema_arrow.names)
        row = itertools.count()
        for batch in file.iter_batches(READ_ROWS, columns=[column]):
            yield from zip(row, batch.column(0).to_pylist(), strict=False)


def _json_values(path: Path, column: str | None) -> Values:
    for number, row in _json_rows(path):
        if column not in row:
            raise _missing_column(f"{path}, line {number}", column, row)
        yield number, row[column]


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SourceError(f"{path}, line {number}: not JSON ({error}); one object a line is expected") from None
        if not isinstance(row, dict):
            raise SourceError(f"{path}, line {number}: a {type(row).__name__}, not an object")
        yield number, row


def _csv_values(path: Path, column: str | None) -> Values:
    rows = _csv_rows(path)
    _, header = next(rows, (0, []))
    if column not in header:
        raise _missing_column(path, column, header)
    place, only_numbers = header.index(column), None
    for number, row in rows:
        if only_numbers is not False and row[place].strip():
            only_numbers = _NUMBER.fullmatch(row[place]) is not None
        yield number, row[place]
    if only_numbers:
        raise SourceError(f"{path}: column '{column}' holds numbers only, expected texts", argument="column")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The header and the rows, all of one length."""
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of 128 KiB
    lines = (line for _, line in _lines(path))
    rows = csv.reader(lines, delimiter=_delimiter(path), strict=True)
    size = 0
    try:
        for row in filter(None, rows):
            size = size or len(row)
            if len(row) != size:
                sizes = f"{len(row)} fields, but the header has {size}"
                raise SourceError(f"{path}, line {rows.line_num}: {sizes} (a comma outside quotes?)")
            yield rows.line_num, row
    except csv.Error as error:
        raise SourceError(f"{path}, line {rows.line_num}: broken row ({error})") from None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def _txt_values(path: Path, column: str | None) -> Values:
    return ((number, line.rstrip("\r\n")) for number, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends, numbered from 1."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.encode()
            except UnicodeEncodeError:  # an escaped byte
                raise SourceError(f"{path}, line {number}: not UTF-8") from None
            yield number, line


_FORMATS = {
    ".parquet": _parquet_values,
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json_values),
    **dict.fromkeys((".csv", ".tsv"), _csv_values),
    ".txt": _txt_values,
}


def _scan(path: Path) -> pl.LazyFrame:
    """All columns of a file whose rows have been checked."""
    _check_file(path)
    # Types by all rows: by the first hundred, a column that begins later is lost and one that begins empty refused.
    match path.suffix:
        case ".parquet":
            return pl.scan_parquet(path)
        case ".csv" | ".tsv":
            deque(_csv_rows(path), maxlen=0)
            return pl.scan_csv(path, separator=_delimiter(path), infer_schema_length=None)
        case ".txt":
            return pl.LazyFrame({DEFAULT_COLUMN: [text for _, text in _txt_values(path, None)]})
        case _:
            deque(_json_rows(path), maxlen=0)
            return pl.scan_ndjson(path, infer_schema_length=None)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceError(f"{path} is damaged or no {path.suffix[1:]} file: {reason}") from None


def _hub_values(source: HubSource) -> Values:
    import datasets

    what = f"data set {source.label} (split {source.split}, revision {source.revision or 'main'})"
    try:
        _check_revision(source)
        rows = datasets.load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, streaming=True
        )
        columns = rows.column_names or list(next(iter(rows), {}))
        if source.column not in columns:
            raise _missing_column(what, source.column, columns)
        yield from enumerate(row[source.column] for row in rows.select_columns([source.column]))
    except SourceError:
        raise
    # The library raises whatever the network, the cache or the files give it; all of it is about this data set.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"cannot read {what}: {reason} (a hub that answers or a filled datasets cache is needed)"
        ) from None


def _check_revision(source: HubSource) -> None:
    """Raises SourceError if the cache would stand in for a pinned commit with another one.

    Offline the library serves the newest cached version, whatever revision it was asked for.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    if source.revision is None or not _COMMIT.fullmatch(source.revision):
        return
    builder = datasets.load_dataset_builder(source.name, source.config, revision=source.revision)
    if isinstance(builder, Cache) and builder.hash != source.revision:
        raise SourceError(
            f"data set {source.label}: the hub does not answer, and the datasets cache holds revision {builder.hash}, "
            f"not {source.revision}: fill the cache with it, or change the revision",
            argument="revision",
        )
