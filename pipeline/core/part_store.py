"""Resumable work in parts, and files that appear only when they are complete.

A part's name holds its position, a hash of its input and one of its bytes: the same work, run again, resumes after the
last finished part, and a damaged part is detected.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.core.fault_points import fault_point
from pipeline.core.files import bytes_sha256, digest_of, disk_errors, file_sha256, fsync_path, write_bytes
from pipeline.core.row_store import locked
from pipeline.core.run import work_dir

log = logging.getLogger(__name__)


class Parts:
    """Finished parts in a folder; `open_parts` makes one."""

    def __init__(self, folder: Path, suffix: str) -> None:
        """Remove temporary files of a killed write."""
        self._folder, self._suffix = folder, suffix
        for leftover in folder.glob(f".*{suffix}.*"):
            leftover.unlink()
        self._paths = {path.stem.rpartition("-")[0]: path for path in folder.glob(f"*{suffix}")}

    def put(self, place: int, source: Any, content: bytes | pa.Buffer) -> Path:
        """Write a part once all of it is there; `source` serialises to JSON."""
        key = _key(place, source)
        self._paths[key] = self._folder / f"{key}-{bytes_sha256(content)[:16]}{self._suffix}"
        fault_point("part_store.commit")
        write_bytes(self._paths[key], content)
        fault_point("part_store.committed")
        return self._paths[key]

    def find(self, place: int, source: Any) -> Path | None:
        """The part, if it was written and is undamaged."""
        key = _key(place, source)
        if (path := self._paths.get(key)) is None:
            return None
        if file_sha256(path)[:16] == path.stem.rpartition("-")[2]:
            return path
        log.warning("%s is damaged (torn write or changed bytes): it is made again", path)
        self._paths.pop(key).unlink()
        return None

    def within(self, name: str) -> "Parts":
        """Parts of another step of the same work."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        return Parts(folder, self._suffix)


def _key(place: int, source: Any) -> str:
    return f"{place:08d}-{digest_of(source)[:16]}"


@contextlib.contextmanager
def open_parts(stage: str, conditions: Any, suffix: str) -> Iterator[Parts]:
    """The parts of work done under `conditions`, for this process alone; they go when the block ends well.

    `conditions` are what decides a part besides its source (serialises to JSON): under others nothing is found.

    Raises:
        WorkError: the disk is full, or another process is at the same work.
    """
    with locked(work_dir(stage) / digest_of(conditions)[:16]) as folder:
        yield Parts(folder, suffix)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes `path` when the block ends well.

    Raises:
        WorkError: the disk is full or not writable.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            fsync_path(unfinished)
            unfinished.replace(path)
            fsync_path(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
