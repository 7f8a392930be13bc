"""Folders that appear whole or not at all: scratch folders of one process each, and the swap that ends them."""

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.core.fault_points import fault_point
from pipeline.core.files import fsync_path

_LOCK = "lock"
_OLD = "old"


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A folder beside `target` that is this process's alone while it lives; what killed ones left there goes."""
    _recover(target)
    scratch, lock = _locked_folder(target)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        lock.release()


def _locked_folder(target: Path) -> tuple[Path, FileLock]:
    while True:
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.tmp-"))
        lock = FileLock(scratch / _LOCK)
        with contextlib.suppress(Timeout, FileNotFoundError):
            lock.acquire(blocking=False)
            if (scratch / _LOCK).exists():
                return scratch, lock
            lock.release()  # another writer took the folder, not locked yet, for a leftover


def _recover(target: Path) -> None:
    """Remove what killed writers of `target` left; what a live one writes stays.

    One that was killed between the two renames of `replace_folder` moved the old artifact away: it comes back.
    """
    for leftover in sorted(target.parent.glob(f".{target.name}.tmp-*")):
        lock = FileLock(leftover / _LOCK)
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):  # its writer lives, or has just ended
            continue
        try:
            if (leftover / _OLD).exists() and not target.exists():
                (leftover / _OLD).rename(target)
            shutil.rmtree(leftover, ignore_errors=True)
        finally:
            lock.release()


def replace_folder(target: Path, new: Path) -> None:
    """Put `new`, a folder in a scratch folder of `target`, in the place of `target`."""
    fault_point("artifact.commit")
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        # Two renames, not a removal and a rename: deleting a large artifact takes long enough to be killed in.
        target.rename(new.with_name(_OLD))
        fault_point("artifact.swap")
        new.rename(target)
    fsync_path(target.parent)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # <linux/fs.h>
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def _exchange(one: Path, other: Path) -> bool:
    """Swap what two paths name, in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))
