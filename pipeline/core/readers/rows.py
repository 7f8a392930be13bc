"""The rows of a file of any format, a few in memory at a time, each with its place for messages.

A place is a line from 1, an item of a JSON array from 1, or a row of a Parquet file from 0. CSV has texts only: "NA",
"null", "1" and "true" are what they say. In JSON the last of two equal keys counts, as in every common parser.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import SourceError
from pipeline.core.readers.files import CHUNK, JSON, File, damage, lines, open_text

READ_ROWS = 4096
DEFAULT_COLUMN = "text"
_BLANK = " \t\r\n"

# Of each row its place and its value.
Values = Iterator[tuple[int, Any]]
Rows = Iterator[tuple[int, dict[str, Any]]]


def values(file: File, column: str | None) -> Values:
    """One column of a file; None for .txt.

    Raises:
        SourceError: the file or a row is damaged, or the column is missing.
    """
    match file.format:
        case ".parquet":
            return _parquet_values(file, column)
        case ".txt":
            return ((place, row[DEFAULT_COLUMN]) for place, row in _text_rows(file))
        case ".csv" | ".tsv":
            return _csv_values(file, column)
    return _json_values(file, column)


def rows(file: File) -> Rows:
    """The rows of a text file with all columns; .txt has the column `text`. Raises as `values`."""
    match file.format:
        case ".txt":
            return _text_rows(file)
        case ".csv" | ".tsv":
            return _csv_rows(file)
    return _json_rows(file)


def where(file: File, place: int) -> str:
    """A row of a file, for messages."""
    unit = "row" if file.format == ".parquet" else "item" if _is_array(file) else "line"
    return f"{file}, {unit} {place}"


def missing_column(where: object, column: str | None, columns: Iterable[str]) -> SourceError:
    """The error that what `where` names has no `column`; `columns` are those that it has."""
    message = f"{where}: no column '{column}' (columns there: {', '.join(columns) or 'none'})"
    return SourceError(message, argument="column")


def _not_one(file: File, column: str | None, columns: list[str]) -> SourceError:
    if column in columns:
        return SourceError(f"{file}: two columns are called '{column}'", argument="column")
    return missing_column(file, column, columns)


# --- Parquet --------------------------------------------------------------------------------------------------------


def _parquet_values(file: File, column: str | None) -> Values:
    first = 0
    for batch in parquet_batches(file, READ_ROWS, [str(column)]):
        yield from enumerate(plain_values(file, batch.column(0), first), start=first)
        first += batch.num_rows


def parquet_batches(file: File, size: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a Parquet file, `size` rows at a time; raises SourceError if it is damaged or lacks one."""
    with damage(file, "parquet"), pq.ParquetFile(file.path, pre_buffer=False) as opened:  # else a whole row group
        for column in columns:
            if opened.schema_arrow.names.count(column) != 1:
                raise _not_one(file, column, opened.schema_arrow.names)
        yield from opened.iter_batches(size, columns=columns)


def plain_values(file: File, column: pa.Array, first: int) -> list[Any]:
    """The values of a column; what is stored as JSON (Arrow's type, which `datasets` writes) is parsed.

    Raises SourceError, with the row (`first` is that of the first value), if it is no JSON.
    """
    parse, found = _json_parser(column.type), column.to_pylist()
    if parse is None:
        return found
    for row, value in enumerate(found):
        try:
            found[row] = parse(value)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{where(file, first + row)}: not JSON ({reason_of(error)})") from None
    return found


def holds_json(type_: pa.DataType) -> bool:
    """Whether a value of an Arrow type holds JSON."""
    return _json_parser(type_) is not None


def _json_parser(type_: pa.DataType) -> Callable[[Any], Any] | None:
    """Parses the JSON within a value of an Arrow type; None if it holds none."""
    if isinstance(type_, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_struct(type_):
        parsers = {field.name: parse for field in type_ if (parse := _json_parser(field.type)) is not None}
        if parsers:
            return lambda value: value and value | {name: parse(value[name]) for name, parse in parsers.items()}
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        item = _json_parser(type_.value_type)
        if item is not None:
            return lambda value: value and [item(each) for each in value]
    return None


# --- JSON -----------------------------------------------------------------------------------------------------------


def _json_values(file: File, column: str | None) -> Values:
    for place, row in _json_rows(file):
        if column not in row:
            raise missing_column(where(file, place), column, row)
        yield place, row[column]


def _json_rows(file: File) -> Rows:
    found = _array_items(file) if _is_array(file) else _json_lines(file)
    for place, row in found:
        if not isinstance(row, dict):
            raise SourceError(f"{where(file, place)}: a {type(row).__name__}, not an object")
        yield place, row


def _json_lines(file: File) -> Values:
    for number, line in lines(file):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"not JSON ({reason_of(error)}); one object a line is expected"
            raise SourceError(f"{file}, line {number}: {reason}") from None


def _is_array(file: File) -> bool:
    if file.format not in JSON:
        return False
    with open_text(file) as text:
        start = " "
        while start and not start.strip(_BLANK):
            start = text.read(CHUNK)
    # A line of JSON Lines that is a list, "[1, 2]", is named by its line.
    return start.lstrip(_BLANK)[:1] == "[" and start.lstrip(_BLANK)[1:].lstrip(_BLANK)[:1] in ("{", "]", "")


def _array_items(file: File) -> Values:
    """The objects of one JSON array; the text of a few is in memory."""
    parser, number = json.JSONDecoder(), 0
    with open_text(file) as text:
        window = _Window(text.read)
        window.skip("[")
        while not window.skip("]"):
            if number and not window.skip(","):
                raise SourceError(f"{file}, item {number}: not JSON (no comma and no end of the list behind it)")
            number += 1
            try:
                yield number, window.parse(parser)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{file}, item {number}: not JSON ({reason_of(error)})") from None
        if window.next():
            raise SourceError(f"{file}: not JSON (there is text behind the list)")


class _Window:
    """The text of a file from one place on, as far as it was read."""

    def __init__(self, read: Callable[[int], str]) -> None:
        self._read, self._text, self._at = read, "", 0

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _BLANK:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self, sign: str) -> bool:
        """Pass over `sign` if it is next."""
        found = self.next() == sign
        self._at += found
        return found

    def parse(self, parser: json.JSONDecoder) -> Any:
        """The next value; raises ValueError if there is none."""
        self.next()
        while True:
            try:
                value, self._at = parser.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
            else:
                return value

    def _more(self) -> bool:
        # Twice as much each time: a long item is parsed only a few times.
        read = self._read(max(CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + read, 0
        return bool(read)


def reason_of(error: Exception) -> str:
    """Why something is no JSON, in a few words."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


# --- CSV and text ---------------------------------------------------------------------------------------------------


def _csv_values(file: File, column: str | None) -> Values:
    found = _csv_lists(file)
    _, header = next(found, (0, []))
    if header.count(str(column)) != 1:
        raise _not_one(file, column, header)
    at = header.index(str(column))
    return ((number, row[at]) for number, row in found)


def _csv_rows(file: File) -> Rows:
    found = _csv_lists(file)
    _, header = next(found, (0, []))
    if len(set(header)) < len(header):
        raise SourceError(f"{file}: two columns have one name: {', '.join(header)}", argument="column")
    return ((number, dict(zip(header, row, strict=True))) for number, row in found)


def csv_header(file: File) -> list[str]:
    """The columns of a CSV file; raises as `values`."""
    return next(_csv_lists(file), (0, []))[1]


def _csv_lists(file: File) -> Iterator[tuple[int, list[str]]]:
    """The header and the rows, all of one length."""
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of 128 KiB
    found = csv.reader(
        (line for _, line in _text_lines(file)), delimiter="\t" if file.format == ".tsv" else ",", strict=True
    )
    size = 0
    try:
        for row in filter(None, found):
            size = size or len(row)
            if len(row) != size:
                sizes = f"{len(row)} fields, but the header has {size}"
                raise SourceError(f"{file}, line {found.line_num}: {sizes} (a comma outside quotes?)")
            yield found.line_num, row
    except csv.Error as error:
        raise SourceError(f"{file}, line {found.line_num}: broken row ({error})") from None


def _text_rows(file: File) -> Rows:
    return ((number, {DEFAULT_COLUMN: line.rstrip("\r\n")}) for number, line in _text_lines(file))


def _text_lines(file: File) -> Iterator[tuple[int, str]]:
    for number, line in lines(file):
        if "\0" in line:
            what = "a NUL character: UTF-16 without a byte order mark, or no text"
            raise SourceError(f"{file}, line {number}: holds {what}", argument="path")
        yield number, line
