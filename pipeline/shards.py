"""ShardStore: rows of long work, keyed by content id, committed as they finish and never computed twice.

A store lives in `<work>/<stage>/<fingerprint>/`. The fingerprint covers everything that changes a row's bytes, so
changed params find an empty store and old rows are never mistaken for new ones. A shard is one Parquet file that
carries the hash of its bytes in its name: a torn or altered shard is noticed when the store opens, and its rows are
computed again. One process writes at a time; the lock vanishes with its process.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pipeline.artifacts import (
    PART_BYTES,
    bytes_sha256,
    digest_of,
    disk_errors,
    file_sha256,
    fsync_path,
    write_bytes,
    write_json,
    write_parquet,
)
from pipeline.errors import WorkError

log = logging.getLogger(__name__)

FLUSH_ROWS = 256
FLUSH_SECONDS = 10.0
COMPACT_ABOVE = 64  # small shards
_SHARD_PATTERN = "[0-9]*-*.parquet"


class ShardStore:
    """Append-only rows of one schema with a unique string column `id`."""

    def __init__(
        self,
        root: Path,
        schema: pa.Schema,
        fingerprint: Mapping[str, Any],
        *,
        flush_rows: int = FLUSH_ROWS,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> None:
        """Open or create the store of `fingerprint` below `root`.

        Raises:
            WorkError: another live process holds the store, or the disk refuses.
        """
        self.path = root / digest_of({**fingerprint, "schema": str(schema)})[:16]
        self.schema = schema
        self._flush_rows, self._flush_seconds = flush_rows, flush_seconds
        self._pending: list[dict[str, Any]] = []
        self._last_flush = time.monotonic()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquire_lock()
            self._where: dict[str, tuple[Path, int]] = {}
            self._next = 0
            try:
                write_json(self.path / "fingerprint.json", dict(fingerprint))
                self._load()
            except BaseException:
                self._lock.release()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.flush()
        finally:
            self._lock.release()

    def __contains__(self, row_id: str) -> bool:
        return row_id in self._where

    def __len__(self) -> int:
        return len(self._where) + len(self._pending)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a finished row; rows reach the disk every `flush_rows` rows or `flush_seconds` seconds.

        Raises:
            WorkError: the disk is full.
        """
        self._pending.append(dict(row))
        if len(self._pending) >= self._flush_rows or time.monotonic() - self._last_flush >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Commit pending rows as one shard."""
        if self._pending:
            self._commit(pa.Table.from_pylist(self._pending, schema=self.schema))
            self._pending = []
        self._last_flush = time.monotonic()

    def sorted_tables(self, ids: Sequence[str], rows_per_table: int) -> Iterator[pa.Table]:
        """The rows of `ids`, sorted by id, in tables of at most `rows_per_table` rows.

        Holds one table and one shard in memory at a time.

        Raises:
            KeyError: an id is not in the store.
        """
        self.flush()
        ordered = sorted(ids)
        for start in range(0, len(ordered), rows_per_table):
            yield self._gather(ordered[start : start + rows_per_table])

    def _gather(self, ids: Sequence[str]) -> pa.Table:
        by_shard: dict[Path, list[tuple[int, int]]] = {}
        for position, row_id in enumerate(ids):
            shard, row = self._where[row_id]
            by_shard.setdefault(shard, []).append((position, row))
        pieces, positions = [], []
        for shard, rows in by_shard.items():
            pieces.append(pq.read_table(shard, schema=self.schema).take([row for _, row in rows]))
            positions += [position for position, _ in rows]
        order = pa.array(sorted(range(len(positions)), key=positions.__getitem__), pa.int64())
        return pa.concat_tables(pieces).take(order).combine_chunks()

    def _acquire_lock(self) -> FileLock:
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise WorkError(
                f"{self.path} is in use by another process: wait for it or stop it (the lock goes with its process)"
            ) from None
        return lock

    def _load(self) -> None:
        for leftover in self.path.glob(".*"):
            leftover.unlink()
        for shard in sorted(self.path.glob(_SHARD_PATTERN)):
            self._next = max(self._next, int(shard.name.split("-")[0]) + 1)
            self._index(shard)
        small = self._small_shards()
        if len(small) > COMPACT_ABOVE:
            self._compact(small)

    def _index(self, shard: Path) -> None:
        if file_sha256(shard)[:16] != shard.stem.split("-")[1]:
            log.warning("%s is damaged (torn write or changed bytes): its rows are computed again", shard)
            shard.unlink()
            return
        for row, row_id in enumerate(_ids(pq.read_table(shard, columns=["id"]))):
            self._where.setdefault(row_id, (shard, row))

    def _commit(self, table: pa.Table) -> None:
        shard = self._write_shard(table)
        for row, row_id in enumerate(_ids(table)):
            self._where.setdefault(row_id, (shard, row))

    def _write_shard(self, table: pa.Table) -> Path:
        with disk_errors(self.path):
            sink = pa.BufferOutputStream()
            write_parquet(table, sink)
            content = sink.getvalue().to_pybytes()
            shard = self.path / f"{self._next:08d}-{bytes_sha256(content)[:16]}.parquet"
            write_bytes(shard, content)
        self._next += 1
        return shard

    def _small_shards(self) -> list[tuple[Path, int]]:
        sizes = [(shard, _bytes_in_memory(shard)) for shard in sorted(self.path.glob(_SHARD_PATTERN))]
        return [(shard, size) for shard, size in sizes if size < PART_BYTES // 2]

    def _compact(self, small: Sequence[tuple[Path, int]]) -> None:
        """Merge small shards, in groups that fit in memory.

        A group's shards go after the merged one is on the disk; a crash between the two leaves rows twice, which
        opening the store takes as one.
        """
        for group in _groups(small, PART_BYTES):
            if len(group) > 1:
                self._merge(group)

    def _merge(self, group: Sequence[Path]) -> None:
        merged = pa.concat_tables([self._live_rows(shard) for shard in group]).combine_chunks()
        if merged.num_rows:
            shard = self._write_shard(merged)
            self._where.update((row_id, (shard, row)) for row, row_id in enumerate(_ids(merged)))
        for old in group:
            old.unlink()
        fsync_path(self.path)

    def _live_rows(self, shard: Path) -> pa.Table:
        table = pq.read_table(shard, schema=self.schema)
        live = [row for row, row_id in enumerate(_ids(table)) if self._where[row_id] == (shard, row)]
        return table.take(pa.array(live, pa.int64()))


def _ids(table: pa.Table) -> list[str]:
    return table.column("id").to_pylist()


def _bytes_in_memory(shard: Path) -> int:
    metadata = pq.read_metadata(shard)
    return sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))


def _groups(sized: Sequence[tuple[Path, int]], limit: int) -> Iterator[list[Path]]:
    group: list[Path] = []
    total = 0
    for shard, size in sized:
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(shard)
        total += size
    if group:
        yield group
