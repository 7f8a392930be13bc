"""Start one command as several processes on this machine, and say once why they ended.

The processes (ranks) run the command in the environment that torch.distributed and accelerate read; their side is
`processes.member`. They hear SIGINT and SIGTERM through here, once each. Only the first speaks. Why a rank failed is
written down by itself: whoever fails first takes the others with it, and what those say of it is of no use.

torchrun does the same for several machines; it has one limit for a rank that saves and a rank that hangs, ends with 1
whatever the ranks ended with, and shows forty lines of its own for each error of theirs.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import TrainingError
from pipeline.parallel.devices import places, visible_gpus
from pipeline.parallel.ranks import INTERRUPTED, LAUNCHER, REPORT, SIGNALS, Blame, Failure

log = logging.getLogger(__name__)

# Seconds that the other ranks get to end by themselves once the first rank has ended or one has failed.
GRACE_SECONDS = 15.0
POLL_SECONDS = 0.05
# Lines of a silent rank's stderr to show if it fails without a word.
_TAIL = 20


@dataclass
class _Rank:
    name: str
    process: "subprocess.Popen[bytes]"
    report: Path
    stderr: Path
    ended: float | None = None
    killed: bool = False

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        code = self.process.poll()
        if code is not None and self.ended is None:
            self.ended = time.time()
        return code

    def kill(self) -> None:
        """End it and all that it started, by force."""
        if self.poll() is None:
            self.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def failure(self) -> Failure | None:
        """Why it failed; None if it did not, or was killed here."""
        code = self.process.returncode
        if self.killed or code in (0, INTERRUPTED):
            return None
        if self.report.is_file():
            return self._reported()
        at = self.ended or time.time()
        if code < 0:
            # A process that a library aborts may only have missed another one.
            blame = Blame.UNKNOWN if code == -signal.SIGABRT else Blame.CRASH
            return Failure(blame, at, f"{self.name} died ({_death(-code)}); the last checkpoint is kept")
        said = self.stderr.read_text(errors="replace").splitlines()[-_TAIL:] if self.stderr.is_file() else []
        return Failure(Blame.UNKNOWN, at, f"{self.name} ended with exit code {code}", "\n".join(said))

    def _reported(self) -> Failure:
        found = Failure(**json.loads(self.report.read_text()))
        if found.blame == Blame.USER:
            return found
        return replace(found, message=f"{self.name} failed: {found.message} (its traceback is above)")


def _death(number: int) -> str:
    how = f"killed by {signal.Signals(number).name}"
    return f"{how}; the system does that when memory runs out" if number == signal.SIGKILL else how


def relaunch(module: str, argv: Sequence[str], count: int) -> None:
    """Run `python -m module argv` in `count` processes that know of each other, and wait for their end.

    Raises:
        TrainingError: one failed; the message is its own.
        KeyboardInterrupt: SIGINT or SIGTERM came, and every process has ended.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # The meeting point lives here, so that no port is guessed and no rank's end takes it away.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, _forwarded(ranks) as asked:
        try:
            with _held_back():
                for index, environment in enumerate(_environments(count, store.port)):
                    ranks.append(_start(module, argv, f"rank {index} of {count}", environment, Path(folder)))
            for number in asked:  # another thread may have taken it before all were there
                _send(ranks, number)
            _wait(ranks)
        finally:
            for rank in ranks:
                rank.kill()
        failures = sorted((found for rank in ranks if (found := rank.failure())), key=lambda one: (one.blame, one.at))
    if failures and not (asked and failures[0].blame >= Blame.UNKNOWN):
        if failures[0].details:
            log.error("%s", failures[0].details)
        raise TrainingError(failures[0].message)
    if asked:
        raise KeyboardInterrupt


def _environments(count: int, port: int) -> Iterator[dict[str, str]]:
    """What the environment of each rank says beyond this process's own."""
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    machine = _machine()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for index, place in enumerate(places(count)):
        # Every rank sees all GPUs and takes the one of its number, as all launchers do it.
        own = {name: value for name, value in place.environment.items() if name != "CUDA_VISIBLE_DEVICES"}
        yield {**machine, **group, **meeting, **own, "RANK": str(index), "LOCAL_RANK": str(index)}


def _machine() -> Mapping[str, str]:
    if not visible_gpus():
        return {"ACCELERATE_USE_CPU": "true"}
    from accelerate.utils import check_cuda_p2p_ib_support

    # accelerate refuses such cards (RTX 40) otherwise; its own launcher sets the same.
    return {} if check_cuda_p2p_ib_support() else {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}


def _start(module: str, argv: Sequence[str], name: str, environment: Mapping[str, str], folder: Path) -> _Rank:
    index = environment["RANK"]
    report, stderr = folder / f"{index}.json", folder / f"{index}.stderr"
    own = {LAUNCHER: str(os.getpid()), REPORT: str(report)}
    with contextlib.ExitStack() as opened:
        silent = opened.enter_context(stderr.open("wb")) if index != "0" else None
        process = subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            env={**os.environ, **environment, **own},
            stdin=subprocess.DEVNULL,
            stdout=silent,
            stderr=silent,
            start_new_session=True,  # Ctrl-C comes from here alone, and once
        )
    return _Rank(name, process, report, stderr)


def _wait(ranks: Sequence[_Rank]) -> None:
    """Wait until all have ended, or the others had their time after the first's end or a failure."""
    deadline = float("inf")
    while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < deadline:
        # One that was interrupted early only waits for the first to save.
        if codes[0] is not None or not {None, 0, INTERRUPTED}.issuperset(codes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _forwarded(ranks: Sequence[_Rank]) -> Iterator[list[int]]:
    """Meanwhile SIGINT and SIGTERM go to the ranks; gives the list of those that came."""
    asked: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        asked.append(number)
        _send(ranks, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(ranks: Sequence[_Rank], number: int) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.process.send_signal(number)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Processes that start meanwhile get no signal before `member`, and this one gets it right after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
