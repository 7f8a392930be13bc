"""A shim over `os` and `open`: this process dies, or meets a full disk, at its n-th change of the disk.

A change is a write, fsync, rename, unlink, or the making or removing of a file or folder, below one folder. Python
objects are patched, so pyarrow is given Python files in place of paths; safetensors writes a file in one change.
"""

import builtins
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Fault(StrEnum):
    """What happens at the chosen change.

    `kill` is SIGKILL, in a write after half of its bytes. `power` is a power cut: files that changed since their last
    fsync lose their second half too. `full` is a disk that is full from there on.
    """

    NONE = "none"
    KILL = "kill"
    POWER = "power"
    FULL = "full"


@dataclass(frozen=True)
class Tear:
    """Half of a write: `half` at the offset `at` of a file."""

    path: Path
    at: int
    half: bytes

    def on(self, content: bytes) -> bytes:
        """The file's content with it."""
        return content[: self.at] + self.half + content[self.at + len(self.half) :]


_FUNCTIONS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir")
_NEEDS_SPACE = ("write", "open", "mkdir", "fsync")


class Disk:
    """Counts changes below `root`, and makes the fault at number `at` (from 1); `install` patches this process.

    `watch` is called before each change, with the half of a write that a stop would leave.
    """

    def __init__(
        self,
        root: Path,
        fault: Fault = Fault.NONE,
        at: int = 0,
        watch: "Callable[[Disk, Tear | None], None] | None" = None,
    ) -> None:
        self.root, self.fault, self.at, self.watch, self.changes = root.resolve(), fault, at, watch, 0
        self._mutex = threading.RLock()
        self._real_open, self._real_fsync = io.open, os.fsync
        self._synced = {inode: state for _, inode, state in self._states()}

    def install(self) -> None:
        """Patch `os`, `open`, pyarrow and safetensors for the rest of this process's life."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from pipeline.core import folders

        for name in _FUNCTIONS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.fsync = self._fsync
        builtins.open = io.open = self._open
        folders._exchange = self._counted("exchange", folders._exchange)
        pq.write_table = self._to_python_file(pq.write_table, 1)
        pa.ipc.new_stream = self._to_python_file(pa.ipc.new_stream, 0)
        pq.ParquetWriter = self._parquet_writer(pq.ParquetWriter)
        if "safetensors.torch" in sys.modules:
            real = sys.modules["safetensors.torch"].save_file
            for module in _importers("save_file", real):
                module.save_file = self._safetensors(real)

    def change(self, kind: str, tear: Tear | None = None) -> None:
        """Count a change that is about to happen, a write with its first half."""
        with self._mutex:
            self.changes += 1
            if self.watch is not None:
                self.watch(self, tear)
            if self.fault == Fault.NONE or self.changes < self.at:
                return
            if self.fault == Fault.FULL:
                if kind in _NEEDS_SPACE:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return
            if tear is not None:
                with self._real_open(tear.path, "r+b", 0) as file:
                    file.seek(tear.at)
                    file.write(tear.half)
            if self.fault == Fault.POWER:
                for path in self.unsynced():
                    os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keys: Any) -> Any:
            if "dir_fd" in keys or any(self._below(part) for part in arguments[:2]):
                self.change(kind)
            return real(*arguments, **keys)

        return call

    def _safetensors(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Its errors are no OSError, and name the operating system's in their message."""
        from safetensors import SafetensorError

        counted = self._counted("write", real)

        def call(tensors: Any, file: Any, *more: Any) -> Any:
            try:
                return counted(tensors, file, *more)
            except OSError as error:
                reason = f"{error.strerror} (os error {error.errno})"
                raise SafetensorError(f"Error while serializing: I/O error: {reason}") from None

        return call

    def _fsync(self, fd: Any) -> None:
        self.change("fsync")
        self._real_fsync(fd)
        state = os.fstat(fd)
        self._synced[state.st_ino] = (state.st_size, state.st_mtime_ns)

    def _below(self, place: Any) -> bool:
        if isinstance(place, int):  # a file descriptor, or the mode of mkdir
            link = Path(f"/proc/self/fd/{place}")
            place = link.readlink() if link.is_symlink() else None
        if not isinstance(place, str | os.PathLike):
            return False
        return Path(os.fsdecode(place)).absolute().is_relative_to(self.root)

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *more: Any, **keys: Any) -> Any:
        if not set(mode) & set("wax+") or not self._below(file):
            return self._real_open(file, mode, buffering, *more, **keys)
        self.change("open")
        names = ("encoding", "errors", "newline", "closefd", "opener")
        options = {**dict(zip(names, more, strict=False)), **keys}
        plain = mode.replace("b", "").replace("t", "")
        raw = _File(self, file, plain, options.get("closefd", True), options.get("opener"))
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        return io.TextIOWrapper(buffer, options.get("encoding"), options.get("errors"), options.get("newline"))

    def _to_python_file(self, real: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*arguments: Any, **keys: Any) -> Any:
            given = list(arguments)
            if isinstance(given[position], str | os.PathLike) and self._below(given[position]):
                given[position] = self._open(given[position], "wb", 0)
            return real(*given, **keys)

        return call

    def _parquet_writer(self, real: Any) -> Any:
        disk = self

        class Writer(real):  # type: ignore[misc]
            def __init__(self, where: Any, *arguments: Any, **keys: Any) -> None:
                named = isinstance(where, str | os.PathLike)
                super().__init__(disk._open(where, "wb", 0) if named else where, *arguments, **keys)

        return Writer

    def _states(self) -> list[tuple[Path, int, tuple[int, int]]]:
        found = []
        for path in self.root.rglob("*"):
            state = path.stat() if path.is_file() else None
            if state is not None:
                found.append((path, state.st_ino, (state.st_size, state.st_mtime_ns)))
        return found

    def unsynced(self) -> list[Path]:
        """The files that changed since their last fsync."""
        return [path for path, inode, state in self._states() if self._synced.get(inode) != state]


class _File(io.FileIO):
    """A file whose writes are counted, buffered ones when the buffer is written out."""

    def __init__(self, disk: Disk, file: Any, mode: str, closefd: bool, opener: Any) -> None:
        super().__init__(file, mode, closefd, opener)
        self._disk = disk

    def write(self, content: Any) -> int:
        whole = memoryview(content).cast("B")
        path = Path(f"/proc/self/fd/{self.fileno()}").readlink()
        at = os.fstat(self.fileno()).st_size if "a" in self.mode else self.tell()
        self._disk.change("write", Tear(path, at, bytes(whole[: len(whole) // 2])))
        return super().write(content)


def _importers(name: str, value: Any) -> list[Any]:
    return [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(name) is value]
