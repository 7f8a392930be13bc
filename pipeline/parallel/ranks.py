"""One process of a group that shares every batch of a stage, whoever launched the group.

python -m pipeline.train                one a GPU by default; the stage launches them itself (`launch`)
accelerate launch -m pipeline.train     the stage launches none
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from pipeline.core.errors import PipelineError, TrainingError
from pipeline.parallel.devices import Count, visible_gpus, worker_count

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Environment variables set by `launch`: the pid of the launcher, and the file for the report of a failure.
LAUNCHER, REPORT = "PIPELINE_LAUNCHER", "PIPELINE_RANK_REPORT"


class FailureCause(IntEnum):
    """What a failure comes from; the smallest value of a group is the one to report."""

    USER = 0
    CRASH = 1
    UNKNOWN = 2
    NEIGHBOUR = 3


@dataclass(frozen=True)
class Failure:
    """Why a rank failed: the cause, when (seconds since the epoch), in one line, and at length."""

    cause: FailureCause
    at: float
    message: str
    details: str = ""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Of an error that ended this rank; one of another rank is told by its words."""
        if isinstance(error, PipelineError):
            return cls(FailureCause.USER, time.time(), str(error))
        cause = FailureCause.NEIGHBOUR if _is_of_connection(error) else FailureCause.CRASH
        trace = "".join(traceback.format_exception(error)).rstrip()
        return cls(cause, time.time(), f"{type(error).__name__}: {error}", trace)


def rank_count(processes: Count, batch_size: int) -> int:
    """How many ranks to train with; "auto" is one for each visible GPU, and one on a CPU.

    Raises:
        TrainingError: more than visible GPUs, or than the `batch_size` rows of a step.
    """
    count = worker_count(processes, gpus_each=1, error=TrainingError)
    if count > batch_size:
        raise TrainingError(
            f"{count}, but a step has {batch_size} rows for all of them (batch_size): set it to at most {batch_size}, "
            "or raise batch_size",
            argument="processes",
        )
    return count


def launched() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this is the only process or rank 0: the one that writes and logs."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def rank_process() -> Iterator[None]:
    """Around the work of a process that may be a rank; one of `launch` that fails reports to it and exits here."""
    if not launched():
        yield
        return
    _follow_launcher()
    if "ACCELERATE_USE_CPU" not in os.environ and not visible_gpus():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise every process would train alone
    if not is_first():
        logging.getLogger("pipeline").setLevel(logging.ERROR)
        logging.getLogger("__main__").setLevel(logging.ERROR)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    except KeyboardInterrupt:
        if REPORT in os.environ or not is_first():
            _end_at_once(INTERRUPTED)
        raise
    except Exception as error:
        if REPORT in os.environ:
            Path(os.environ[REPORT]).write_text(json.dumps(asdict(Failure.of(error))))
            _end_at_once(1)
        raise
    _leave_group()


def _follow_launcher() -> None:
    """Exit once the launcher is gone: nobody would notice that this process hangs."""
    launcher = int(os.environ.get(LAUNCHER) or os.getppid())

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _leave_group() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_at_once(code: int) -> None:
    """Exit without the interpreter's shutdown, which may wait for collectives that the others never join."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_of_connection(error: Exception) -> bool:
    """Whether an exception may only mean that another rank is gone."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or any(word in str(error) for word in ("gloo", "NCCL", "Connection", "ProcessGroup"))
