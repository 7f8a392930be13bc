"""Files that are written whole or not at all, their hashes, and what a disk that refuses them says."""

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError, WorkError
from pipeline.core.fault_points import fault_point

PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "version": "2.6",
    "use_dictionary": False,
    "row_group_size": 4096,
}


def to_json(value: Any) -> str:
    """Canonical JSON for files: sorted keys, two spaces, one newline at the end."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON-serialisable value, independent of key order."""
    return bytes_sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def bytes_sha256(content: bytes | pa.Buffer) -> str:
    """sha256 (hex) of bytes."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Force a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_REFUSED = (errno.EACCES, errno.EPERM)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)
_QUOTED = re.compile("'(/?[^']+)'")  # pyarrow names the file in its message alone
# safetensors, and shutil of a folder, name the error in their message alone.
_ERROR = re.compile(r"(?:\(os error |\[Errno )(\d+)")


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a file in place of a folder into a WorkError that names the place.

    A missing permission of a file that is no part of `where` is about that file: the block may also read.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        number, place = _number(error), _place(error)
        if number in _NO_FOLDER and (blocking := _file_above(place or where)):
            raise WorkError(f"{blocking} is a file, where a folder is needed: move it away, and run again") from error
        if number in _REFUSED and place is not None and not _belongs(place, where):
            raise WorkError(f"cannot open {place}: {os.strerror(number)}") from error
        if number not in (*_FULL, *_REFUSED):
            raise
        raise WorkError(
            f"cannot write {where}: {os.strerror(number)}. Finished work is kept; free space or choose another "
            "place (PIPELINE_WORK_DIR moves work in progress) and run again"
        ) from error


def _number(error: Exception) -> int:
    """The operating system's number of an error, 0 if it has none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _ERROR.search(str(error))
    return int(found[1]) if found else 0


def _place(error: Exception) -> Path | None:
    """The file that an error is about, if it says so."""
    named = getattr(error, "filename", None)
    if isinstance(named, str | os.PathLike):
        return Path(named)
    quoted = _QUOTED.search(str(error))
    return Path(quoted[1]) if quoted else None


def _file_above(path: Path) -> Path | None:
    """The first of `path` and the folders that it needs that is a file."""
    return next((part for part in reversed([path, *path.parents]) if part.is_file()), None)


def _belongs(place: Path, where: Path) -> bool:
    """Whether `place` is `where`, a part of it, a scratch name of it, or a folder that it needs."""
    place, where = place.absolute(), where.absolute()
    if place in (where, *where.parents):
        return True
    above = where.parent
    if above not in place.parents:
        return False
    name = place.relative_to(above).parts[0]
    return name == where.name or name.startswith(f".{where.name}.")


def write_bytes(path: Path, content: bytes | pa.Buffer) -> None:
    """Write a file atomically: temporary name in the same folder, fsync, rename."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            fault_point("file.rename")
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write canonical JSON atomically."""
    write_bytes(path, to_json(value).encode())


def write_parquet(table: pa.Table, path: Path | pa.NativeFile) -> None:
    """Write one Parquet file with options that make equal tables equal bytes."""
    pq.write_table(table, path, **PARQUET_OPTIONS)
