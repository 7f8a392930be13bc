"""Texts of a corpus on disk while rows are filtered, so that memory holds row numbers and ids only.

Rows are numbered in reading order. Their texts lie in buckets by the first bits of their id: ids are hashes, so buckets
are equally large, and buckets in order, each sorted, are the whole corpus sorted by id.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.core.files import disk_errors
from pipeline.core.row_store import locked

BUCKETS = 64
ID_BITS = 128
_SCHEMA = pa.schema([("row", pa.int64()), ("text", pa.large_string())])
_PREFIX = "scratch-"

Rows = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]


def prefixes(ids: pl.Series, count: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The part that each id lies in, of `count` equal parts of all ids, uint8 [N]; a power of two up to 256."""
    return (ids // (2**ID_BITS // count)).cast(pl.UInt8).to_numpy()


@contextlib.contextmanager
def scratch_folder(work: Path) -> Iterator[Path]:
    """A folder below `work`, removed at the end; leftovers of killed processes are removed at the start.

    Raises WorkError if another live process uses `work`, or the disk is full or not writable.
    """
    with locked(work):
        for leftover in work.glob(f"{_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with disk_errors(work):
            folder = Path(tempfile.mkdtemp(dir=work, prefix=_PREFIX))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Spill:
    """Numbered texts: added in order, then read bucket by bucket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths = [folder / f"{bucket:02d}.arrow" for bucket in range(BUCKETS)]
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with disk_errors(folder):
            self._writers = [pa.ipc.new_stream(str(path), _SCHEMA, options=options) for path in self._paths]

    def add(self, rows: Rows, ids: pl.Series, texts: pl.Series) -> None:
        """Add texts with their row numbers and ids (as in `rows`); raises WorkError if the disk is full."""
        buckets = prefixes(ids, BUCKETS)
        order = np.argsort(buckets, kind="stable")
        ends = np.searchsorted(buckets[order], np.arange(BUCKETS + 1))
        columns = [pa.array(rows[order], pa.int64()), texts.gather(order).to_arrow().cast(pa.large_string())]
        batch = pa.record_batch(columns, schema=_SCHEMA)
        with disk_errors(self._folder):
            for bucket in np.flatnonzero(np.diff(ends)):
                self._writers[bucket].write_batch(batch.slice(ends[bucket], ends[bucket + 1] - ends[bucket]))

    def finish(self) -> None:
        """End writing; reading starts here; raises WorkError if the disk is full."""
        with disk_errors(self._folder):
            for writer in self._writers:
                writer.close()

    def buckets(self, chosen: Mask) -> Iterator[tuple[Rows, pl.Series]]:
        """Numbers and texts of the rows in `chosen` (bool, by row number), a bucket at a time in order of the ids."""
        for path in self._paths:
            with path.open("rb") as file:
                table = pa.ipc.open_stream(file).read_all()
            rows = table.column("row").to_numpy()
            found = np.flatnonzero(chosen[rows])
            if len(found):
                yield rows[found], pl.Series("text", table.column("text")).gather(found)

    def batches(self, chosen: Mask, size: int) -> Iterator[tuple[Rows, pl.Series]]:
        """As `buckets`, in pieces of at most `size` rows."""
        for rows, texts in self.buckets(chosen):
            for start in range(0, len(rows), size):
                yield rows[start : start + size], texts.slice(start, size)
