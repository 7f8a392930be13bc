"""Processes of an owner that is killed are killed too; others are not."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from tests.conftest import ROOT

OWNER = """
import subprocess, sys, time
from pipeline.parallel.reaper import Reaper
reaper = Reaper()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
print(child.pid, reaper._process.pid, flush=True)
if sys.argv[1] == "close":
    reaper.close()
    print("closed", flush=True)
time.sleep(60)
"""


def owner(what: str) -> "tuple[subprocess.Popen[str], int, int]":
    """A process with a child and a reaper: itself and the pids of both."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, what], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    child, reaper = map(int, process.stdout.readline().split())
    return process, child, reaper


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_of_a_killed_owner_is_killed_and_the_reaper_ends(number: signal.Signals) -> None:
    process, child, reaper = owner("wait")
    time.sleep(2)  # a few polls
    assert not gone(child)
    assert not gone(reaper)
    process.send_signal(number)
    process.communicate()
    assert soon(lambda: gone(child) and gone(reaper))


def test_a_closed_reaper_kills_nothing() -> None:
    process, child, reaper = owner("close")
    assert process.stdout is not None
    assert process.stdout.readline() == "closed\n"
    assert gone(reaper)
    process.kill()
    process.communicate()
    time.sleep(1)
    assert not gone(child)
    psutil.Process(child).kill()
