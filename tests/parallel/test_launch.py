"""One command in several processes: each knows its place, one speaks, a failure is said once, nobody is left over."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.core.errors import TrainingError
from pipeline.core.run import own_cores
from pipeline.parallel.launch import launch_ranks
from tests.conftest import ROOT


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`ranks("speak")` runs two toy ranks that do so; they leave their traces in tmp_path."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("pipeline.parallel.launch.GRACE_SECONDS", 1.0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda what: launch_ranks("tests.parallel.toy_rank", [what, str(tmp_path)], 2)


def gone(folder: Path) -> bool:
    pids = [int(path.read_text()) for path in folder.glob("*.pid")]
    assert len(pids) == 2
    return all(not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in pids)


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 240
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_each_knows_its_place_and_only_the_first_speaks(
    ranks: Callable[[str], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks("speak")
    threads = max(1, len(own_cores()) // 2)
    for rank in range(2):
        assert (tmp_path / f"{rank}.told").read_text() == f"{rank} {rank} 2 2 127.0.0.1 {threads} true"
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "some" in line] == ["INFO some news", "WARNING some trouble"]
    assert sum("work: 100%" in line for line in lines) == 1
    assert gone(tmp_path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("refuse", "^no such backbone$"),
        ("second-refuses", "^no room on the second$"),
        ("second-breaks", r"^rank 1 of 2 failed: KeyError: 'oops' \(its traceback is above\)$"),
        ("second-is-killed", r"^rank 1 of 2 died \(killed by SIGKILL; .*memory.*\); the last checkpoint is kept$"),
        ("second-leaves", "^rank 1 of 2 ended with exit code 7$"),
        ("neighbour", "^rank 1 of 2 ended with exit code 3$"),
    ],
)
def test_a_failure_is_said_once_and_ends_all(
    what: str,
    message: str,
    ranks: Callable[[str], None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(TrainingError, match=message):
        ranks(what)
    assert gone(tmp_path)
    assert capfd.readouterr().err == ""
    assert ("KeyError: 'oops'" in caplog.text) == (what == "second-breaks")
    assert ("a last word" in caplog.text) == (what == "second-leaves")


Owner = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def owner(tmp_path: Path) -> Owner:
    """Starts a process, leader of its group, whose two ranks work until a signal tells them to stop."""

    def start() -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.toy_rank", "work", str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert soon(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
        return process

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_rank_once_and_the_first_has_time_to_save(
    number: signal.Signals, owner: Owner, tmp_path: Path
) -> None:
    process = owner()
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors == "interrupted: finished work is kept, run the same command again to go on\n"
    assert (tmp_path / "saved").read_text() == "1"
    assert gone(tmp_path)


def test_a_second_interrupt_ends_all_at_once(owner: Owner, tmp_path: Path) -> None:
    """Rank 0 is in the middle of saving, which takes it 1.5 seconds."""
    process = owner()
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "saved").exists()
    assert gone(tmp_path)


def test_kill_9_of_the_launcher_leaves_nobody(owner: Owner, tmp_path: Path) -> None:
    process = owner()
    process.kill()
    process.communicate()
    assert soon(lambda: gone(tmp_path))
    assert not (tmp_path / "saved").exists()
