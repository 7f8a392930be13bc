"""What test_launch.py runs as one command in several processes; no torch, so that it starts at once.

python -m tests.parallel.toy_rank WHAT FOLDER

Alone it starts two ranks; as a rank it does WHAT and writes its identity to FOLDER.
"""

import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from pipeline.core.errors import BackboneError
from pipeline.core.run import progress, setup_logging, user_errors
from pipeline.parallel.launch import launch_ranks
from pipeline.parallel.ranks import is_first, launched, rank_process

log = logging.getLogger("pipeline.toy")

TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU")


def work(what: str, folder: Path) -> None:
    """The life of a rank."""
    (folder / f"{os.environ['RANK']}.told").write_text(" ".join(os.environ.get(name, "-") for name in TOLD))
    (folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    _wait_for_the_other(folder)
    match what, is_first():
        case "speak", _:
            log.info("some news")
            log.warning("some trouble")
            list(progress(range(3), total=3, desc="work"))
        case "refuse", _:
            raise BackboneError("no such backbone")
        case "second-refuses", False:
            raise BackboneError("no room on the second")
        case "second-breaks", False:
            raise KeyError("oops")
        case "second-is-killed", False:
            os.kill(os.getpid(), signal.SIGKILL)
        case "second-leaves", False:
            warnings.warn("a last word", stacklevel=1)
            sys.exit(7)
        case "neighbour", True:
            time.sleep(0.3)
            raise RuntimeError("[gloo] Connection closed by peer")
        case "neighbour", False:
            os._exit(3)
        case "work", _:
            _work_until_told(folder)
        case _:
            time.sleep(100)


def _wait_for_the_other(folder: Path) -> None:
    """A rank that fails ends the other, which a busy machine may not have started yet."""
    deadline = time.monotonic() + 240
    while len(list(folder.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)


def _work_until_told(folder: Path) -> None:
    """Steps that a signal does not cut; the second ends at once after its step, the first saves."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _frame: asked.append(got))
    (folder / f"{os.environ['RANK']}.ready").touch()
    while not asked:
        time.sleep(0.05)
    if is_first():
        time.sleep(1.5)
        (folder / "saved").write_text(str(len(asked)))
    raise KeyboardInterrupt


if __name__ == "__main__":
    setup_logging()
    with user_errors(), rank_process():
        if launched():
            work(sys.argv[1], Path(sys.argv[2]))
        else:
            launch_ranks("tests.parallel.toy_rank", sys.argv[1:], 2)
