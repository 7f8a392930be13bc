"""Rows that are read, written to Parquet of any size. Killed and run again, it goes on behind the last finished chunk.

Known texts are looked for at the end, for thousands of rows at once: their index may be far larger than the input.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import ArtifactWriter, bytes_sha256, write_parquet
from pipeline.errors import SourceError
from pipeline.lens.nearest import check_width
from pipeline.lens.reading import ROWS, Lens, held_by, held_in, measured
from pipeline.lens.sources import Chunk, Source
from pipeline.parts import Parts, open_parts, whole_file
from pipeline.runtime import progress

Array = np.ndarray[Any, Any]

# Covers whatever changes a row.
VERSION = 2
# Rows of a part, by device: what a kill costs at most, and what shuffled pairs are drawn from.
CHUNK_ROWS = {"cpu": 64, "cuda": 1024}
# Rows that go through an index together; of 4,096 dimensions they take 128 MiB.
GROUP_ROWS = 8192
# Column of a part, beside those of its rows, where the nearest are still to be found.
_EMBEDDING = "embedding"


class Written(NamedTuple):
    """How many rows there are, and how many of them an earlier run had read."""

    rows: int
    kept: int


def write_rows(
    lens: Lens,
    source: Source,
    output: Path,
    *,
    conditions: Mapping[str, Any],
    instruction: str = "",
    embed: Callable[[Sequence[str]], Array] | None = None,
    chunk_rows: int | None = None,
) -> Written:
    """Read a source and write the rows (schema `reading.ROWS`).

    Args:
        lens: reads.
        source: what.
        output: appears when it is complete; a file there is replaced.
        conditions: what decides a row besides its source (serialises to JSON): under others nothing is taken over.
        instruction: before each text, see `Encoder.encode`.
        embed: the teacher, for the cosines; None leaves them null.
        chunk_rows: rows of a part; None: `CHUNK_ROWS` of the device.

    Raises:
        SourceError: the source is damaged or changes meanwhile, or the lens' index is of another width.
        WorkError: the disk is full, or another process is at the same work.
    """
    if lens.index is not None:
        check_width(lens.index, lens.encoder.width)
    device = lens.encoder.model.device.type
    rows = chunk_rows or CHUNK_ROWS.get(device, CHUNK_ROWS["cuda"])
    everything = {"version": VERSION, "chunk_rows": rows, "instruction": instruction, **conditions}
    with open_parts("decode", everything, ".parquet") as parts:
        done, kept = _read_all(lens, source, parts, rows, instruction, embed)
        tables = (pq.read_table(path) for path in done)
        with whole_file(output) as unfinished:
            found = _with_nearest(lens, tables, parts.within("nearest")) if lens.searches else tables
            ArtifactWriter(unfinished.parent).write_stream(unfinished.name, found, ROWS)
    return Written(source.rows, kept)


def _read_all(
    lens: Lens,
    source: Source,
    parts: Parts,
    rows: int,
    instruction: str,
    embed: Callable[[Sequence[str]], Array] | None,
) -> tuple[list[Path], int]:
    """All parts in order, those that are missing made, and how many rows were there before."""
    done: list[Path] = []
    kept = read = 0
    nothing: list[str] = []
    with progress(nothing, total=source.rows, desc="decode", unit="text") as bar:
        for place, chunk in enumerate(source.chunks(rows)):
            made_of = [list(chunk.entries.ids), list(chunk.entries.responses)]
            part = parts.find(place, made_of)
            count = len(chunk.entries.ids)
            if part is not None:
                kept += count
                bar.initial += count
            done.append(part or parts.put(place, made_of, _content(_read(lens, chunk, instruction, embed))))
            read += count
            bar.update(count)
    if read != source.rows:
        raise SourceError(f"{source.name} changed while it was read: run again")
    return done, kept


def _read(lens: Lens, chunk: Chunk, instruction: str, embed: Callable[[Sequence[str]], Array] | None) -> pa.Table:
    if chunk.soft_prompts is None:
        held = held_by(lens.encoder, [query or "" for query in chunk.entries.queries], instruction)
    else:
        held = held_in(lens.encoder, chunk.soft_prompts)
    table = replace(lens, index=None).read(chunk.entries, held)
    table = table if embed is None else measured(table, held.embeddings, embed)
    return table.append_column(_EMBEDDING, _column(held.embeddings)) if lens.searches else table


def _with_nearest(lens: Lens, tables: Iterator[pa.Table], parts: Parts) -> Iterator[pa.Table]:
    """The rows with their nearest in place of their embeddings; a group of them goes through the index at once."""
    for place, group in enumerate(_groups(tables)):
        embeddings = _matrix(group[_EMBEDDING])
        made_of = bytes_sha256(embeddings.tobytes())
        part = parts.find(place, made_of)
        found = part or parts.put(place, made_of, _content(pa.table({"nearest": lens.near(embeddings)})))
        yield group.drop_columns(["nearest", _EMBEDDING]).append_column("nearest", pq.read_table(found)["nearest"])


def _groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Tables put together to `GROUP_ROWS` rows or a little more, the last one shorter."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(each.num_rows for each in group) >= GROUP_ROWS:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)


def _column(embeddings: Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])


def _matrix(column: pa.ChunkedArray) -> Array:
    flat: Array = column.combine_chunks().flatten().to_numpy()
    return flat.reshape(len(column), -1)


def _content(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    write_parquet(table, sink)
    return sink.getvalue()
