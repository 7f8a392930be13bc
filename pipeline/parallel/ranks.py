"""Several processes of one stage on one machine, each with a share of every batch.

    train.processes: auto                          one a GPU; the stage starts them itself
    accelerate launch -m pipeline.train     they are started from outside, and the stage starts none

This is what a process has to know of the others, however they were started; `launching` starts them.
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
# Set by `launching`: the process to follow, and the file for the reason of a failure.
LAUNCHER, REPORT = "PIPELINE_LAUNCHER", "PIPELINE_RANK_REPORT"


class Blame(IntEnum):
    """Who is to blame for a failure, surest first."""

    USER = 0
    CRASH = 1
    UNKNOWN = 2
    NEIGHBOUR = 3


@dataclass(frozen=True)
class Failure:
    """Why a process failed: when (seconds since the epoch), in one line, and at length."""

    blame: Blame
    at: float
    message: str
    details: str = ""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """What an exception says."""
        if isinstance(error, PipelineError):
            return cls(Blame.USER, time.time(), str(error))
        blame = Blame.NEIGHBOUR if _is_of_connection(error) else Blame.CRASH
        trace = "".join(traceback.format_exception(error)).rstrip()
        return cls(blame, time.time(), f"{type(error).__name__}: {error}", trace)


def wanted(processes: Count, batch_size: int) -> int:
    """How many processes to train with; "auto" is one for each visible GPU, and one on a CPU.

    Args:
        processes: a number, or "auto".
        batch_size: rows of one step, over all processes.

    Raises:
        TrainingError: more than visible GPUs, or than rows of a step.
    """
    count = worker_count(processes, gpus_each=1, knob="train.processes", error=TrainingError)
    if count > batch_size:
        raise TrainingError(
            f"train.processes is {count}, but a step has {batch_size} rows for all of them (train.batch_size): "
            f"set it to at most {batch_size}, or raise train.batch_size"
        )
    return count


def launched() -> bool:
    """Whether this process is one of a group already: a launcher says so in its environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this is the only process or the first of its group: the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def member() -> Iterator[None]:
    """Around the work of a process that may be one of several; by itself it changes nothing.

    A process that `launching` started ends here if it fails, and leaves the words to its launcher. One of another
    launcher fails as it would alone.
    """
    if not launched():
        yield
        return
    _follow_launcher()
    if "ACCELERATE_USE_CPU" not in os.environ and not visible_gpus():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else every process would train alone
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
    """End this process once the one that started it is gone: nobody would see it hang."""
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
    """End without the interpreter's own farewell, which may wait for collectives that the others never join."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_of_connection(error: Exception) -> bool:
    """Whether an exception may only say that another process is gone."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in names or any(word in str(error) for word in ("gloo", "NCCL", "Connection", "ProcessGroup"))
