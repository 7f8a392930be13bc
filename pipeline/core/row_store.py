"""ShardStore: rows of long work, keyed by content id, committed as they finish and never computed twice.

A store lives in `<work>/<stage>/<fingerprint>/`; the fingerprint covers everything that changes a row's bytes. A shard
is a Parquet file, sorted by id, with the hash of its bytes in its name: a damaged one is removed when the store opens,
and its rows are computed again. One process writes at a time. In memory are the pending rows, and the first and last id
of each shard: which rows are there is read from the shards, for a range of ids at a time.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pipeline.core.errors import BusyError, WorkError
from pipeline.core.fault_points import fault_point
from pipeline.core.files import (
    bytes_sha256,
    digest_of,
    disk_errors,
    file_sha256,
    fsync_path,
    write_bytes,
    write_json,
    write_parquet,
)

log = logging.getLogger(__name__)

# What a kill can cost: at most this much work, whichever comes first.
FLUSH_ROWS = 4096
FLUSH_SECONDS = 2.0
SHARD_BYTES = 32 * 2**20  # of a merged shard, which is made in memory, several times over
COMPACT_ABOVE = 64  # shards of one size class
TINY_BYTES = 4 * 2**20
_SHARD_PATTERN = "[0-9]*-*.parquet"
_HOLDER = "holder.json"
_MERGED = b"merged"  # in a shard's metadata: the names of those whose rows it has


@dataclass(frozen=True)
class _Shard:
    """What is known of a shard without its rows: their number, their bytes in memory, the first and the last id."""

    path: Path
    rows: int
    size: int
    first: str
    last: str

    @classmethod
    def of(cls, path: Path) -> Self:
        metadata = pq.read_metadata(path)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        at = metadata.schema.names.index("id")
        ends = [group.column(at).statistics for group in (groups[0], groups[-1])]
        size = sum(group.total_byte_size for group in groups)
        return cls(path, metadata.num_rows, size, ends[0].min, ends[1].max)


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
            BusyError: another live process holds the store.
            WorkError: the disk refuses.
        """
        self.path = root / digest_of({**fingerprint, "schema": str(schema)})[:16]
        self.schema = schema
        self._flush_rows, self._flush_seconds = flush_rows, flush_seconds
        self._rows: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []
        self._pending = 0
        self._last_flush = time.monotonic()
        self._refused = False  # the disk; the owner knows
        self._mutex, self._closing = threading.RLock(), threading.Event()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.path)
            self._shards: dict[Path, _Shard] = {}
            self._next = 0
            try:
                write_json(self.path / "fingerprint.json", dict(fingerprint))
                self._load()
            except BaseException:
                self._lock.release()
                raise

    def __enter__(self) -> Self:
        threading.Thread(target=self._flush_in_time, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        known = self._refused
        try:
            self.flush()
        except WorkError:  # raised a second time, it would be printed by a generator that is closed by the first
            if not known:
                raise
        finally:
            with self._mutex:
                self._lock.release()

    def __contains__(self, row_id: str) -> bool:
        """Whether the row is committed; `committed` looks for many at once."""
        return bool(self.committed([row_id]))

    def __iter__(self) -> Iterator[str]:
        """The ids of committed rows."""
        with self._mutex:
            shards = list(self._shards)
        for shard in shards:
            yield from pq.read_table(shard, columns=["id"], partitioning=None)["id"].to_pylist()

    def __len__(self) -> int:
        return sum(shard.rows for shard in self._shards.values()) + self._pending

    def committed(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids whose rows are on the disk. Reads the range that they span: ask for neighbours together."""
        wanted = set(ids)
        if not wanted:
            return wanted
        with self._mutex:
            found = self._read(min(wanted), max(wanted), ["id"])["id"]
        return wanted.intersection(found.to_pylist())

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a finished row whose id is new; raises WorkError if the disk is full."""
        with self._mutex:
            self._rows.append(dict(row))
            self._added(1)

    def add_table(self, table: pa.Table) -> None:
        """Add finished rows of the store's schema whose ids are new; see `add`."""
        with self._mutex:
            self._tables.append(table)
            self._added(table.num_rows)

    def flush(self) -> None:
        """Commit pending rows as one shard; raises WorkError if the disk is full."""
        try:
            self._flush()
        except WorkError:
            self._refused = True
            raise
        self._refused = False

    def _flush(self) -> None:
        with self._mutex:
            if self._pending:
                rows = pa.Table.from_pylist(self._rows, schema=self.schema)
                self._commit(pa.concat_tables([*self._tables, rows]))
                self._rows, self._tables, self._pending = [], [], 0
                with disk_errors(self.path):
                    self._compact()
            self._last_flush = time.monotonic()

    def take(self, ids: Sequence[str] | pa.Array) -> pa.Table:
        """The rows of `ids`, in that order, read from the range that they span; raises KeyError if one is missing."""
        self.flush()
        wanted = pa.array(ids, pa.string())
        if not len(wanted):
            return self.schema.empty_table()
        span = pc.min_max(wanted).as_py()
        with self._mutex:
            found = self._read(span["min"], span["max"])
        positions = pc.index_in(wanted, found["id"].combine_chunks())
        if positions.null_count:
            raise KeyError(wanted[pc.index(pc.is_null(positions), True).as_py()].as_py())
        return found.take(positions).combine_chunks()

    def _read(self, first: str, last: str, columns: list[str] | None = None) -> pa.Table:
        """The committed rows from one id to another, of the shards and row groups that may hold some."""
        inside = (pc.field("id") >= first) & (pc.field("id") <= last)
        tables = [self.schema.empty_table().select(columns or self.schema.names)]
        for shard in self._shards.values():
            if shard.first <= last and shard.last >= first:
                read = {"schema": self.schema, "columns": columns, "filters": inside, "partitioning": None}
                tables.append(pq.read_table(shard.path, **read))
        return pa.concat_tables(tables)

    def _added(self, rows: int) -> None:
        self._pending += rows
        if self._pending >= self._flush_rows or time.monotonic() - self._last_flush >= self._flush_seconds:
            self.flush()

    def _flush_in_time(self) -> None:
        """Rows that came in a burst are not left in memory until the next one comes."""
        while not self._closing.wait(self._flush_seconds):
            with contextlib.suppress(WorkError):  # the owner's next row meets the same disk
                self._flush()

    def _load(self) -> None:
        for leftover in self.path.glob(".*"):
            leftover.unlink()
        # Newest first: a merged shard comes before the ones that it replaces.
        for shard in sorted(self.path.glob(_SHARD_PATTERN), reverse=True):
            self._next = max(self._next, int(shard.name.split("-")[0]) + 1)
            if shard.exists():
                self._index(shard)
        self._compact()

    def _index(self, shard: Path) -> None:
        if file_sha256(shard)[:16] != shard.stem.split("-")[1]:
            log.warning("%s is damaged (torn write or changed bytes): its rows are computed again", shard)
            shard.unlink()
            return
        self._shards[shard] = _Shard.of(shard)
        merged = (pq.read_schema(shard).metadata or {}).get(_MERGED, b"[]")
        for name in json.loads(merged):  # a crash may have kept it from being removed
            (self.path / name).unlink(missing_ok=True)

    def _commit(self, table: pa.Table) -> None:
        fault_point("row_store.commit")
        self._write_shard(table)
        fault_point("row_store.committed")

    def _write_shard(self, table: pa.Table, merged: Sequence[Path] = ()) -> None:
        names = {_MERGED: json.dumps([path.name for path in merged])} if merged else None
        with disk_errors(self.path):
            sink = pa.BufferOutputStream()
            write_parquet(table.sort_by("id").combine_chunks().replace_schema_metadata(names), sink)
            content = sink.getvalue()
            shard = self.path / f"{self._next:08d}-{bytes_sha256(content)[:16]}.parquet"
            write_bytes(shard, content)
        self._next += 1
        self._shards[shard] = _Shard.of(shard)

    def _compact(self) -> None:
        """Merge the shards of a size class once there are many, so that rows are rewritten a few times at most."""
        for limit in (min(TINY_BYTES, SHARD_BYTES // 2), SHARD_BYTES // 2):
            small = sorted((shard.path, shard.size) for shard in self._shards.values() if shard.size < limit)
            if len(small) > COMPACT_ABOVE:
                for group in _groups(small, SHARD_BYTES):
                    if len(group) > 1:
                        self._merge(group)

    def _merge(self, group: Sequence[Path]) -> None:
        """One shard of the rows of several; those go after it is on the disk, so a crash leaves rows twice at worst."""
        tables = [pq.read_table(old, schema=self.schema, partitioning=None) for old in group]
        self._write_shard(pa.concat_tables(tables), group)
        fault_point("row_store.merge")
        for old in group:
            old.unlink()
            del self._shards[old]
        fsync_path(self.path)


def lock_folder(folder: Path) -> FileLock:
    """A lock on work in `folder`, which also ends with its process; raises BusyError if another process has it."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BusyError(
            f"{folder} is in use by another process{_holder(folder)}: wait for it or stop it (the lock goes with its "
            "process)"
        ) from None
    write_json(folder / _HOLDER, {"pid": os.getpid()})
    return lock


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """The folder, created and locked for the block; raises WorkError as `lock_folder`, or if the disk refuses."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    try:
        yield folder
    finally:
        lock.release()


def _holder(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return f" (pid {json.loads((folder / _HOLDER).read_text())['pid']})"
    return ""


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
