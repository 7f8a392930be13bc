"""A process that kills an engine's processes once their owner is gone, even by `kill -9`.

vLLM's engine process does not notice that its owner died and would hold its memory for ever.

    python -m pipeline.parallel.reaper PID       watches the process PID
"""

import contextlib
import os
import subprocess
import sys
import time

import psutil

POLL_SECONDS = 0.5


class Reaper:
    """Watches all descendants of this process until `close`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "pipeline.parallel.reaper", str(os.getpid())]
        # In a session of its own it does not receive Ctrl-C.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def close(self) -> None:
        """Stop watching."""
        self._process.kill()
        self._process.wait()


def watch(owner: psutil.Process) -> None:
    """Return when `owner` is gone, after killing its descendants."""
    children: set[psutil.Process] = set()
    while _lives(owner):
        with contextlib.suppress(psutil.NoSuchProcess):
            children |= set(owner.children(recursive=True))
        time.sleep(POLL_SECONDS)
    for child in children:
        # psutil does not kill a process that has reused the id of a child.
        if child.pid != os.getpid():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    with contextlib.suppress(psutil.NoSuchProcess):
        watch(psutil.Process(int(sys.argv[1])))
