"""Work in forked children: they share the imports of this process, which itself computes nothing."""

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Work = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, negative for a signal, and what it wrote to stderr."""

    code: int
    stderr: str

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.stderr

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Child:
    """A forked process that does `work` in the folder `workspace`."""

    def __init__(self, work: Work, workspace: Path, log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._log = log
        self.pid = os.fork()
        if self.pid == 0:
            _be_child(work, workspace, log)

    def wait(self) -> Ended:
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), self._log.read_text(encoding="utf-8", errors="replace"))

    def kill_after(self, seconds: float) -> Ended:
        """SIGKILL after some seconds, unless it has ended."""
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()


def run(work: Work, workspace: Path, log: Path) -> Ended:
    """Do `work` in a child and wait for it."""
    return Child(work, workspace, log).wait()


def _be_child(work: Work, workspace: Path, log: Path) -> None:
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.stdout = sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
        os.chdir(workspace)
        code = _exit_code(work)
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _exit_code(work: Work) -> int:
    try:
        work()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


class Journal:
    """Which rows were computed, in a file outside of the workspace that no fault touches."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(self, rows: Iterable[str]) -> None:
        os.write(self._descriptor, "".join(f"{row}\n" for row in rows).encode("utf-8", "replace"))

    def clear(self) -> None:
        os.truncate(self._path, 0)

    def keep(self, rows: list[str]) -> None:
        """These rows alone."""
        self.clear()
        self.add(rows)

    def repeated(self) -> int:
        """How many rows were computed again."""
        rows = self._path.read_text().splitlines()
        return len(rows) - len(set(rows))

    def __iter__(self) -> Iterator[str]:
        return iter(self._path.read_text().splitlines())
