"""Files as tables with all their columns.

A column has one type over all rows: the one of its values, or text where they have none in common (a number is then
written as in JSON). CSV has texts only. Arrow's dictionaries and views become plain columns.
"""

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import SourceError, first_line
from pipeline.core.readers.files import File, damage, find_files
from pipeline.core.readers.rows import (
    DEFAULT_COLUMN,
    READ_ROWS,
    csv_header,
    holds_json,
    missing_column,
    parquet_batches,
    plain_values,
    rows,
    where,
)
from pipeline.core.readers.texts import texts_of


def read_table(*paths: Path, texts: Collection[str] = ()) -> pa.Table:
    """All columns of the files that the paths name; a column that a file lacks is null in its rows.

    The columns `texts` are read as `read_texts` reads one: a chat becomes its first user turn.

    Raises:
        SourceError: a file is missing, damaged or of an unknown format, or a value of `texts` is neither text nor chat.
    """
    files = [file for path in paths for file in find_files(path)]
    tables = [table for file in files for table in batches(file, READ_ROWS, texts=texts)]
    names = dict.fromkeys(itertools.chain(*map(columns_of, files), *(table.column_names for table in tables)))
    return pa.table({name: _joined([_column(table, name) for table in tables]) for name in names})


def read_batches(path: Path, size: int, *, without: Collection[str] = ()) -> Iterator[dict[str, list[Any]]]:
    """The values of all columns but some, `size` rows at a time. Raises as `read_table`."""
    for file in find_files(path):
        for table in batches(file, size):
            yield table.drop_columns([name for name in table.column_names if name in without]).to_pydict()


@dataclass(frozen=True)
class Columns:
    """Some columns of files, whose types over all rows are in `schema`; `open_columns` makes one."""

    files: tuple[File, ...]
    schema: pa.Schema

    def chunks(self, size: int) -> Iterator[pa.Table]:
        """The rows in tables of `size`, the last one shorter; raises SourceError if a file is damaged or changed."""
        left = self.schema.empty_table()
        for file in self.files:
            for table in batches(file, READ_ROWS, self.schema.names):
                left = pa.concat_tables([left, self._typed(file, table)])
                while left.num_rows >= size:
                    yield left.slice(0, size)
                    left = left.slice(size)
        if left.num_rows:
            yield left

    def _typed(self, file: File, table: pa.Table) -> pa.Table:
        try:
            columns = [as_type(_column(table, field.name), field.type) for field in self.schema]
        except pa.ArrowException as error:
            message = f"{file}: a column holds values of two kinds ({first_line(error)})"
            raise SourceError(message, argument="keep") from None
        return pa.Table.from_arrays(columns, schema=self.schema)


def open_columns(
    files: Sequence[File], names: Sequence[str] | None = None, *, without: Collection[str] = ()
) -> Columns:
    """Read through some columns once for their types; `names` None: all but `without`.

    Raises:
        SourceError: a file is damaged, or a name is in none of them.
    """
    types: dict[str, list[pa.DataType]] = {}
    for file in files:
        declared = columns_of(file)
        for name in names or () if declared else ():
            if name not in declared:
                raise missing_column(file, name, declared)
        for table in batches(file, READ_ROWS, names if declared else None):
            for field in table.schema:
                if field.type not in types.setdefault(field.name, []):
                    types[field.name].append(field.type)
    chosen = [name for name in types if name not in without] if names is None else names
    for name in chosen:
        if name not in types:
            raise missing_column(files[0], name, types)
    return Columns(tuple(files), pa.schema([(name, common_type(types[name])) for name in chosen]))


def columns_of(file: File) -> list[str]:
    """The columns that a file declares: JSON Lines declare none."""
    match file.format:
        case ".parquet":
            with damage(file, "parquet"):
                return pq.read_schema(file.path).names
        case ".csv" | ".tsv":
            return csv_header(file)
        case ".txt":
            return [DEFAULT_COLUMN]
    return []


def batches(
    file: File, size: int, columns: Sequence[str] | None = None, *, texts: Collection[str] = ()
) -> Iterator[pa.Table]:
    """A file in tables of `size` rows, the last one shorter; types are those of the rows of each.

    Args:
        columns: only these; one that a row of JSON lacks is null there.
        texts: of these only the texts.

    Raises:
        SourceError: the file is damaged, or lacks a column that it must declare; see `read_table`.
    """
    if file.format == ".parquet":
        first = 0
        for batch in parquet_batches(file, size, list(columns_of(file) if columns is None else columns)):
            read = {name: _texts_of if name in texts else _plain for name in batch.schema.names}
            yield pa.table({name: read[name](file, batch.column(name), first) for name in batch.schema.names})
            first += batch.num_rows
        return
    numbered = rows(file)
    while chunk := list(itertools.islice(numbered, size)):
        names = list(dict.fromkeys(name for _, row in chunk for name in row) if columns is None else columns)
        found = {name: [(place, row.get(name)) for place, row in chunk] for name in names}
        for name in texts:
            found |= {name: list(texts_of(iter(found[name]), partial(where, file)))} if name in found else {}
        try:
            yield pa.table({name: _array([value for _, value in found[name]]) for name in names})
        except UnicodeEncodeError as error:
            place = next(place for place, row in chunk if not _encodable(row))
            raise SourceError(f"{where(file, place)}: {error.object[error.start]!r} is half of a character") from None


def _texts_of(file: File, column: pa.Array, first: int) -> pa.Array:
    numbered = enumerate(plain_values(file, column, first), start=first)
    return pa.array([text for _, text in texts_of(numbered, partial(where, file))], pa.string())


def _encodable(row: dict[str, Any]) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(file: File, column: pa.Array, first: int) -> pa.Array:
    """A column of a Parquet file without Arrow's encodings and extensions."""
    if holds_json(column.type):
        return _array(plain_values(file, column, first))
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.string()) if pa.types.is_string_view(column.type) else column


def _array(values: list[Any]) -> pa.Array:
    try:
        found = pa.array(values)
    except (pa.ArrowException, OverflowError):  # two kinds of values, or a number of more than 64 bits
        return _written(values)
    return _written(values) if "struct<>" in str(found.type) else found  # which Parquet cannot hold


def _written(values: Iterable[Any]) -> pa.Array:
    written = (value if value is None or isinstance(value, str) else json.dumps(value, default=str) for value in values)
    return pa.array(written, pa.string())


def common_type(types: Iterable[pa.DataType]) -> pa.DataType:
    """The one type that holds values of all these types."""
    schemas = [pa.schema([("", type_)]) for type_ in types]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def as_type(column: pa.Array, type_: pa.DataType) -> pa.Array:
    """A column in a common type; raises pa.ArrowInvalid if a number would change its value."""
    if column.type == type_:
        return column
    if pa.types.is_string(type_):
        return _written(column.to_pylist())
    return pa.array(column.to_pylist(), type_) if pa.types.is_nested(type_) else column.cast(type_)


def _column(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks() if name in table.column_names else pa.nulls(table.num_rows)


def _joined(columns: list[pa.Array]) -> pa.ChunkedArray:
    type_ = common_type(column.type for column in columns) if columns else pa.null()
    try:
        return pa.chunked_array([as_type(column, type_) for column in columns], type_)
    except pa.ArrowInvalid:  # whole numbers beside fractions, and too large to be such
        return pa.chunked_array([_written(column.to_pylist()) for column in columns], pa.string())
