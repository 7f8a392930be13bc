"""Start one command as several ranks on this machine, and report once why they ended.

Ranks run the command in the environment that torch.distributed and accelerate read; their side is `ranks.rank_process`.
The launcher forwards SIGINT and SIGTERM to them; a second Ctrl-C kills them. A rank that fails writes a report: the
others then fail too, and their errors only say that it is gone. torchrun has one time limit for a rank that saves and
one that hangs, and exits with 1 whatever the ranks exited with.
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
from pipeline.parallel.devices import split_devices, visible_gpus
from pipeline.parallel.ranks import INTERRUPTED, LAUNCHER, REPORT, SIGNALS, Failure, FailureCause
from pipeline.parallel.worker_pool import describe_exit, signals_blocked

log = logging.getLogger(__name__)

# Seconds that the other ranks have to end once the first rank has ended or one has failed.
GRACE_SECONDS = 15.0
POLL_SECONDS = 0.05
# Last lines of a rank's stderr that are shown if it fails without a report.
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
        code = self.process.poll()
        if code is not None and self.ended is None:
            self.ended = time.time()
        return code

    def kill(self) -> None:
        if self.poll() is None:
            self.kill_at_once()
            self.process.wait()

    def kill_at_once(self) -> None:
        """Kill it without waiting for its end; safe in a signal handler."""
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def failure(self) -> Failure | None:
        """Why it failed; None if it did not, or was killed by the launcher."""
        code = self.process.returncode
        if self.killed or code in (0, INTERRUPTED):
            return None
        if self.report.is_file():
            return self._reported()
        at = self.ended or time.time()
        if code < 0:
            # Libraries abort a process when another one is gone.
            cause = FailureCause.UNKNOWN if code == -signal.SIGABRT else FailureCause.CRASH
            return Failure(cause, at, f"{self.name} died ({describe_exit(code)}); the last checkpoint is kept")
        lines = self.stderr.read_text(errors="replace").splitlines()[-_TAIL:] if self.stderr.is_file() else []
        return Failure(FailureCause.UNKNOWN, at, f"{self.name} ended with exit code {code}", "\n".join(lines))

    def _reported(self) -> Failure:
        found = Failure(**json.loads(self.report.read_text()))
        if found.cause == FailureCause.USER:
            return found
        return replace(found, message=f"{self.name} failed: {found.message} (its traceback is above)")


def launch_ranks(module: str, argv: Sequence[str], count: int) -> None:
    """Run `python -m module argv` as `count` ranks of one group, and wait for their end.

    Raises:
        TrainingError: a rank failed; the message is the rank's.
        KeyboardInterrupt: SIGINT or SIGTERM came, and every process has ended.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # The launcher holds the store: no port is guessed, and it outlives every rank.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, _forwarded(ranks) as received:
        try:
            with signals_blocked(SIGNALS):
                for index, environment in enumerate(_environments(count, store.port)):
                    ranks.append(_start(module, argv, f"rank {index} of {count}", environment, Path(folder)))
            for number in received:  # another thread may have handled it before all ranks were started
                _send(ranks, number)
            _wait(ranks)
        finally:
            for rank in ranks:
                rank.kill()
        failures = sorted((found for rank in ranks if (found := rank.failure())), key=lambda one: (one.cause, one.at))
    if failures and not (received and failures[0].cause >= FailureCause.UNKNOWN):
        if failures[0].details:
            log.error("%s", failures[0].details)
        raise TrainingError(failures[0].message)
    if received:
        raise KeyboardInterrupt


def _environments(count: int, port: int) -> Iterator[dict[str, str]]:
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    machine = _machine()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for index, device in enumerate(split_devices(count)):
        # Every rank sees all GPUs and takes the one of its LOCAL_RANK, as with every launcher.
        own = {name: value for name, value in device.environment.items() if name != "CUDA_VISIBLE_DEVICES"}
        yield {**machine, **group, **meeting, **own, "RANK": str(index), "LOCAL_RANK": str(index)}


def _machine() -> Mapping[str, str]:
    if not visible_gpus():
        return {"ACCELERATE_USE_CPU": "true"}
    from accelerate.utils import check_cuda_p2p_ib_support

    # accelerate refuses cards without P2P (RTX 40) otherwise; its own launcher sets the same.
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
            start_new_session=True,  # Ctrl-C reaches it through the launcher alone, once
        )
    return _Rank(name, process, report, stderr)


def _wait(ranks: Sequence[_Rank]) -> None:
    """Wait until all ranks have ended, at most GRACE_SECONDS after rank 0 ended or one failed."""
    deadline = float("inf")
    while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < deadline:
        # A rank that was interrupted waits for rank 0, which saves.
        if codes[0] is not None or not {None, 0, INTERRUPTED}.issuperset(codes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _forwarded(ranks: Sequence[_Rank]) -> Iterator[list[int]]:
    """In the block SIGINT and SIGTERM go to the ranks, which a second SIGINT kills; yields those received."""
    received: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            for rank in ranks:
                rank.kill_at_once()
        else:
            _send(ranks, number)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(ranks: Sequence[_Rank], number: int) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.process.send_signal(number)
