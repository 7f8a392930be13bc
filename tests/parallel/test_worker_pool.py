"""WorkerPool answer, fail, die and are stopped, and none is left over, whatever happens to their owner."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.core.errors import BackboneError, DeviceMemoryError, EngineError, PipelineError
from pipeline.parallel.devices import Device
from pipeline.parallel.worker_pool import Channel, WorkerPool
from tests.conftest import ROOT

DEVICES = [Device("device a", {"WORKER_COLOUR": "red"}), Device("device b", {"WORKER_COLOUR": "blue"})]


class OutOfMemoryError(RuntimeError):
    """Of torch, by its name."""


def obey(greeting: str, channel: Channel) -> None:
    """A worker that does what it is told."""
    while True:
        match channel.receive():
            case "say":
                channel.send((greeting, os.environ.get("WORKER_COLOUR"), os.getpid()))
            case "flood":
                while True:
                    channel.send("x" * 10_000)
            case "refuse":
                raise BackboneError("no such backbone")
            case "break":
                raise KeyError("oops")
            case "fill":
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80 GiB.")
            case "hang":
                time.sleep(60)
            case "log":
                logging.getLogger("pipeline.test").info("some news")
                logging.getLogger("pipeline.test").warning("some trouble")
                channel.send("logged")
            case ("many", many_sent):
                for number in range(200):
                    channel.send(number)
                Path(many_sent).touch()
            case int(code):
                channel.send("going")
                os._exit(code)


@contextmanager
def workers(where: list[Device] = DEVICES) -> Iterator[WorkerPool]:
    with closing(WorkerPool(partial(obey, "hello"), where, kind="helper", error=EngineError)) as started:
        yield started


def gather(started: WorkerPool, count: int) -> dict[int, Any]:
    found: dict[int, Any] = {}
    while len(found) < count:
        found |= started.receive()
    return found


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_each_works_in_its_place_and_all_end() -> None:
    with workers() as started:
        for index in range(2):
            started.send(index, "say")
        found = gather(started, 2)
    assert [found[index][:2] for index in range(2)] == [("hello", "red"), ("hello", "blue")]
    assert "WORKER_COLOUR" not in os.environ
    pids = {found[0][2], found[1][2]}
    assert len(pids - {os.getpid()}) == 2
    assert all(map(gone, pids))


def test_a_worker_is_bound_to_its_cores() -> None:
    core = min(os.sched_getaffinity(0))
    with workers([Device("one core", cores=(core,))]) as started:
        started.send(0, "say")
        ((_, (_, _, pid)),) = started.receive()
        assert psutil.Process(pid).cpu_affinity() == [core]
    assert len(os.sched_getaffinity(0)) >= 1


def test_its_error_comes_with_its_kind_and_its_name() -> None:
    with workers() as started, pytest.raises(BackboneError, match=r"^helper 1 \(device b\): no such backbone$"):
        started.send(1, "refuse")
        started.receive()


def test_a_lack_of_memory_is_one_line() -> None:
    message = r"^helper 0 \(device a\): out of memory \(no room for another 2.00 GiB\)$"
    with workers() as started, pytest.raises(DeviceMemoryError, match=message):
        started.send(0, "fill")
        started.receive()


def test_an_unforeseen_error_is_named_and_its_traceback_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with workers() as started, pytest.raises(PipelineError, match=r"helper 0 \(device a\): KeyError: 'oops'"):
        started.send(0, "break")
        started.receive()
    assert "Traceback" in capfd.readouterr().err


def test_what_was_sent_before_a_death_is_received_first() -> None:
    with workers() as started:
        started.send(1, 7)
        assert started.receive() == [(1, "going")]
        with pytest.raises(EngineError, match=r"helper 1 \(device b\) died \(exit code 7\); finished rows are kept"):
            started.receive()
        with pytest.raises(EngineError, match="exit code 7"):
            started.receive()


def test_what_the_others_have_sent_is_received_after_a_death(tmp_path: Path) -> None:
    many_sent = tmp_path / "sent"
    with workers() as started:
        for index in range(2):
            started.send(index, "say")
        pids = gather(started, 2)
        started.send(0, ("many", str(many_sent)))
        started.send(1, 7)
        assert soon(lambda: gone(pids[1][2]) and many_sent.exists())  # and nobody has listened
        found = []
        with pytest.raises(EngineError, match="exit code 7"):
            while True:
                found += started.receive()
        assert [message for worker, message in found if worker == 0] == list(range(200))


def test_a_worker_killed_is_named_with_the_signal_and_the_others_stop() -> None:
    with workers() as started:
        for index in range(2):
            started.send(index, "say")
        found = gather(started, 2)
        os.kill(found[0][2], signal.SIGKILL)
        with pytest.raises(EngineError, match=r"helper 0 \(device a\) died \(killed by SIGKILL; .*memory"):
            started.receive()
        started.send(0, "say")  # goes nowhere, quietly
    assert gone(found[1][2])


def test_one_that_sends_and_sends_is_stopped() -> None:
    with workers() as started:
        started.send(0, "flood")
        started.receive()
        before = time.monotonic()
    assert time.monotonic() - before < 10


def test_one_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("pipeline.parallel.worker_pool.GRACE_SECONDS", 1.0)
    with workers() as started:
        for index in range(2):
            started.send(index, "say")
        pids = [answer[2] for answer in gather(started, 2).values()]
        started.send(1, "hang")
    assert all(map(gone, pids))
    assert "helper 1 (device b) does not stop: killing it" in caplog.text


def test_the_first_speaks_for_all_and_each_may_warn(capfd: pytest.CaptureFixture[str]) -> None:
    with workers() as started:
        for index in range(2):
            started.send(index, "log")
        gather(started, 2)
    lines = capfd.readouterr().err.splitlines()
    assert sorted(line for line in lines if "some" in line) == [
        "INFO worker 0: some news",
        "WARNING worker 0: some trouble",
        "WARNING worker 1: some trouble",
    ]


def test_closing_twice_is_fine() -> None:
    with workers() as started:
        started.close()
        started.send(0, "say")


OWNER = """
import sys, time
from contextlib import closing
from functools import partial
from pipeline.core.errors import EngineError
from pipeline.core.run import user_errors
from pipeline.parallel.worker_pool import WorkerPool
from tests.parallel.test_worker_pool import DEVICES, gather, obey

if __name__ == "__main__":
    with user_errors(), closing(WorkerPool(partial(obey, "hi"), DEVICES, kind="helper", error=EngineError)) as started:
        for index in range(2):
            started.send(index, "say")
        print(*(answer[2] for answer in gather(started, 2).values()), flush=True)
        if sys.argv[1] == "leave":
            raise EngineError("enough")
        for _ in range(600):  # a signal just before one long sleep would wait for its end
            time.sleep(0.1)
"""


@pytest.fixture
def owner(tmp_path: Any) -> Callable[[str], "tuple[subprocess.Popen[str], list[int]]"]:
    """Starts a process group whose leader owns two workers: the leader and the pids of the workers."""

    def start(what: str) -> "tuple[subprocess.Popen[str], list[int]]":
        script = tmp_path / "owner.py"
        script.write_text(OWNER)
        process = subprocess.Popen(
            [sys.executable, str(script), what], env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        return process, list(map(int, process.stdout.readline().split()))

    return start


def test_kill_9_of_the_owner_leaves_nobody(owner: Callable[..., Any]) -> None:
    process, pids = owner("wait")
    assert len(pids) == 2
    process.kill()
    process.communicate()
    assert soon(lambda: all(map(gone, pids)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_ends_all_without_a_traceback(number: signal.Signals, owner: Callable[..., Any]) -> None:
    process, pids = owner("wait")
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors == "interrupted: finished work is kept, run the same command again to go on\n"
    assert all(map(gone, pids))


def test_an_error_of_the_owner_ends_all(owner: Callable[..., Any]) -> None:
    process, pids = owner("leave")
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (1, "error: enough\n")
    assert all(map(gone, pids))
