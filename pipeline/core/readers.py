"""Where queries come from: local files and hub data sets, read as plain texts.

A column holds texts, or chats: lists of messages, `{role, content}` or `{from, value}`, of which the first user turn
is the query. A value without one (null, an empty chat) is read as an empty text, which is counted.
"""

import contextlib
import csv
import itertools
import json
import re
import sys
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.config import Params
from pipeline.core.errors import SourceError

_COMMIT = re.compile("[0-9a-f]{40}")
BATCH_ROWS = 2048
_USER_ROLES = ("user", "human", "prompter")


class LocalSource(Params):
    """A file; its suffix says the format: .parquet, .jsonl/.ndjson/.json (one object a line), .csv, .tsv, .txt."""

    kind: Literal["local"]
    path: str = Field(description="relative to collect.local_dir")
    column: str | None = Field(default=None, description="null for .txt, where each line is a query")
    limit: int | None = Field(default=None, ge=1, description="read the first rows only")
    weight: float | None = Field(default=None, gt=0, description="its share of collect.sample; for all sources or none")

    @property
    def label(self) -> str:
        """What the column `source` says of its rows."""
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
    weight: float | None = Field(default=None, gt=0, description="its share of collect.sample; for all sources or none")

    @property
    def label(self) -> str:
        """What the column `source` says of its rows."""
        return f"{self.name}/{self.config}" if self.config else self.name


Source = Annotated[LocalSource | HubSource, Field(discriminator="kind")]


def read_texts(source: LocalSource | HubSource, local_dir: Path) -> Iterator[str]:
    """The raw texts of a source, in its order, at most `source.limit` of them.

    Raises:
        SourceError: the file, data set or column is missing, damaged or holds something else than texts and chats.
    """
    if isinstance(source, HubSource):
        where, values = source.label, _hub_values(source)
    else:
        path = local_dir / source.path
        where, values = str(path), _local_values(path, source.column)
    return (_query_of(value, where) for value in itertools.islice(values, source.limit))


def _query_of(value: Any, where: str) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case [*messages]:
            return next((text for message in messages if (text := _user_text(message, where)) is not None), "")
    raise SourceError(
        f"{where}: found {type(value).__name__} {str(value)[:40]!r}, expected a text or a list of messages"
    )


def _user_text(message: Any, where: str) -> str | None:
    """The text of a message if the user wrote it."""
    if not isinstance(message, dict) or not message.keys() & {"role", "from"}:
        raise SourceError(
            f"{where}: a message must have 'role' and 'content', or 'from' and 'value', not {message!r:.80}"
        )
    if (message.get("role") or message.get("from")) not in _USER_ROLES:
        return None
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # a multimodal message
        return "\n".join(part["text"] for part in content if isinstance(part, dict) and part.get("text"))
    return _query_of(content, where)


def _local_values(path: Path, column: str | None) -> Iterator[Any]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise SourceError(f"{path}: unknown format '{path.suffix}' (known: {', '.join(_READERS)})")
    if not path.is_file():
        raise SourceError(f"{path} does not exist (paths of collect.sources start at collect.local_dir)")
    return reader(path, column)


def _missing_column(where: object, column: str | None, columns: Iterable[str]) -> SourceError:
    problem = f"no column '{column}'" if column else "collect.sources must name a column"
    return SourceError(f"{where}: {problem} (columns there: {', '.join(columns) or 'none'})")


def _read_parquet(path: Path, column: str | None) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # which would hold a whole row group
            if column not in file.schema_arrow.names:
                raise _missing_column(path, column, file.schema_arrow.names)
            for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is damaged or no Parquet file: {error}") from None


def _read_jsonl(path: Path, column: str | None) -> Iterator[Any]:
    with contextlib.closing(_lines(path)) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_value(line, column, f"{path}, line {number}")


def _json_value(line: str, column: str | None, where: str) -> Any:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{where}: not JSON ({error}); one object a line is expected") from None
    if not isinstance(row, dict):
        raise SourceError(f"{where}: a {type(row).__name__}, not an object")
    if column not in row:
        raise _missing_column(where, column, row)
    return row[column]


def _read_csv(path: Path, column: str | None) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of 128 KiB
    with contextlib.closing(_lines(path)) as lines:
        rows = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            header = next(rows, [])
            if column not in header:
                raise _missing_column(path, column, header)
            for row in rows:
                if row and len(row) != len(header):
                    sizes = f"{len(row)} fields, but the header has {len(header)}"
                    raise SourceError(f"{path}, line {rows.line_num}: {sizes} (a comma outside quotes?)")
                if row:
                    yield row[header.index(column)]
        except csv.Error as error:
            raise SourceError(f"{path}, line {rows.line_num}: broken row ({error})") from None


def _read_txt(path: Path, column: str | None) -> Iterator[Any]:
    if column is not None:
        raise SourceError(f"{path}: a .txt file has no columns: set column: null instead of '{column}'")
    return _lines(path)


def _lines(path: Path) -> Generator[str, None, None]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None


_READERS = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_txt,
}


def _hub_values(source: HubSource) -> Iterator[Any]:
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
        yield from (row[source.column] for row in rows.select_columns([source.column]))
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
            f"not {source.revision}: fill the cache with it, or change its revision in collect.sources"
        )
