"""Rows that are read, written to Parquet of any size. Killed and run again, it goes on behind the last finished chunk.

A part carries in its name its place, a hash of what it was read from and one of its own bytes.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import (
    ArtifactWriter,
    bytes_sha256,
    digest_of,
    disk_errors,
    fsync_path,
    write_bytes,
    write_parquet,
)
from pipeline.errors import SourceError
from pipeline.lens.reading import ROWS, Lens, held_by, held_in, measured
from pipeline.lens.sources import Chunk, Source
from pipeline.runtime import progress, work_dir
from pipeline.shards import lock_folder

log = logging.getLogger(__name__)

# Covers whatever changes a row.
VERSION = 1
# Rows of a part, by device: what a kill costs at most, and what shuffled pairs are drawn from.
CHUNK_ROWS = {"cpu": 64, "cuda": 1024}


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
    embed: Callable[[Sequence[str]], np.ndarray[Any, Any]] | None = None,
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
        SourceError: the source is damaged or changes meanwhile.
        WorkError: the disk is full, or another process is at the same work.
    """
    device = lens.encoder.model.device.type
    rows = chunk_rows or CHUNK_ROWS.get(device, CHUNK_ROWS["cuda"])
    everything = {"version": VERSION, "chunk_rows": rows, "instruction": instruction, **conditions}
    folder = work_dir("decode") / digest_of(everything)[:16]
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    try:
        done, kept = _parts(lens, source, folder, rows, instruction, embed)
        _write_whole(output, done)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
    return Written(source.rows, kept)


def _parts(
    lens: Lens,
    source: Source,
    folder: Path,
    rows: int,
    instruction: str,
    embed: Callable[[Sequence[str]], np.ndarray[Any, Any]] | None,
) -> tuple[list[Path], int]:
    """All parts in order, those that are missing made, and how many rows were there before."""
    done: list[Path] = []
    kept = read = 0
    nothing: list[str] = []
    with progress(nothing, total=source.rows, desc="decode", unit="text") as bar:
        for place, chunk in enumerate(source.chunks(rows)):
            part = _find(folder, _key(place, chunk))
            count = len(chunk.entries.ids)
            if part is not None:
                kept += count
                bar.initial += count
            done.append(part or _put(folder, _key(place, chunk), _read(lens, chunk, instruction, embed)))
            read += count
            bar.update(count)
    if read != source.rows:
        raise SourceError(f"{source.name} changed while it was read: run again")
    return done, kept


def _read(
    lens: Lens, chunk: Chunk, instruction: str, embed: Callable[[Sequence[str]], np.ndarray[Any, Any]] | None
) -> pa.Table:
    if chunk.soft_prompts is None:
        held = held_by(lens.encoder, [query or "" for query in chunk.entries.queries], instruction)
    else:
        held = held_in(lens.encoder, chunk.soft_prompts)
    table = lens.read(chunk.entries, held)
    return table if embed is None else measured(table, held.embeddings, embed)


def _key(place: int, chunk: Chunk) -> str:
    return f"{place:08d}-{digest_of([list(chunk.entries.ids), list(chunk.entries.responses)])[:16]}"


def _put(folder: Path, key: str, table: pa.Table) -> Path:
    sink = pa.BufferOutputStream()
    write_parquet(table, sink)
    content = sink.getvalue()
    path = folder / f"{key}-{bytes_sha256(content)[:16]}.parquet"
    write_bytes(path, content)
    return path


def _find(folder: Path, key: str) -> Path | None:
    for path in folder.glob(f"{key}-*.parquet"):
        if bytes_sha256(path.read_bytes())[:16] == path.stem.rpartition("-")[2]:
            return path
        log.warning("%s is damaged (torn write or changed bytes): its rows are read again", path)
        path.unlink()
    return None


def _write_whole(output: Path, parts: Sequence[Path]) -> None:
    """All parts as one file, which appears when it is whole."""
    unfinished = output.with_name(f".{output.name}.unfinished")
    tables: Iterator[pa.Table] = (pq.read_table(path) for path in parts)
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            ArtifactWriter(output.parent).write_stream(unfinished.name, tables, ROWS)
            fsync_path(unfinished)
            unfinished.replace(output)
            fsync_path(output.parent)
        finally:
            unfinished.unlink(missing_ok=True)
