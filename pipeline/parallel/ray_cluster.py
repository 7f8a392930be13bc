"""A connection to Ray: to a cluster that runs, or to a Ray that is started on this machine."""

import logging
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from threading import current_thread, main_thread
from typing import Any

import psutil

from pipeline.core.errors import PipelineError, describe
from pipeline.parallel.reaper import Reaper

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception)\b")
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # A call that comes after the connection ended, as of a thread that was left behind, must not start another Ray.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # By default workers are niced, and beside one other busy process they get next to nothing.
    "RAY_worker_niceness": "0",
    # Actors that read the footers of Parquet files: Ray starts up to 32, and an engine's rows lie in a few files.
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    # A worker's own children, as vLLM's engine is one, end with it.
    "RAY_process_group_cleanup_enabled": "1",
}
# Variables of this process that workers on other machines get too; not PIPELINE_DEVICE, as only theirs may have a GPU.
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME")


def import_ray(error: type[PipelineError]) -> Any:
    """The package, with its logging off; raises `error` if it is not installed."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as missing:
        raise error(f"ray cannot be imported ({describe(missing)}): install it with `pip install -e .[ray]`") from None
    quiet()
    return ray


def quiet() -> None:
    """Turn off the logs of Ray, which sets levels of its own at each import: its errors reach the user as ours."""
    for name in ("ray", "ray.data", "ray.llm", "ray._private.worker"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def worker_environment(threads: int | None = None) -> dict[str, str]:
    """Environment variables of a worker, which does not inherit this process's; `threads` None: it uses a GPU."""
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    if threads is not None:
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return variables


@dataclass
class _Connection:
    """This process's connection to Ray: how many use it, and what ends it."""

    users: int = 0
    end: ExitStack = field(default_factory=ExitStack)


_CONNECTION = _Connection()


@contextmanager
def connected(
    *, error: type[PipelineError], argument: str, address: str | None = None, cpus: int | None = None
) -> Iterator[Mapping[str, float]]:
    """Be connected to Ray in the block, which gets the cluster's resources by Ray's names (CPU, GPU).

    Blocks that overlap share one connection, which is that of the first.

    Args:
        error: raised, about `argument`, if Ray cannot be reached.
        address: of a cluster; None: that of $RAY_ADDRESS, or a Ray that is started here and ends with the last block.
        cpus: logical CPUs of a Ray that is started here.
    """
    ray = import_ray(error)
    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        try:
            with ExitStack() as stack:
                _connect(ray, stack, address, cpus)
                _CONNECTION.end = stack.pop_all()
        except Exception as refused:
            # Ray raises many kinds here: no cluster, other version, no port, no memory for the object store.
            raise error(f"no Ray at '{address}' ({describe(refused)})", argument=argument) from None
    _CONNECTION.users += 1
    try:
        yield dict(ray.cluster_resources())
    finally:
        _CONNECTION.users -= 1
        if not _CONNECTION.users:
            _CONNECTION.end.close()


def _connect(ray: Any, stack: ExitStack, address: str, cpus: int | None) -> None:
    """Connect; what ends the connection goes onto the stack."""
    here: dict[str, Any] = {}
    if address == "local":
        here = {"num_cpus": cpus, "include_dashboard": False}
        stack.callback(Reaper().close)
        stack.callback(_shut_down, ray, _descendants())
    else:
        stack.callback(ray.shutdown)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **here)
    finally:
        if current_thread() is main_thread():  # Ray's own handler exits without our message
            signal.signal(signal.SIGTERM, handler)
    log.info("Ray: %s", "started on this machine" if here else f"cluster {address}")


def last_error(error: Exception) -> str:
    """The innermost error of Ray's, which is the last in its message, below the traceback."""
    lines = str(error).strip().splitlines()
    starts = [index for index, line in enumerate(lines) if ERROR_LINE.match(line)]
    return " ".join(map(str.strip, lines[starts[-1] : starts[-1] + 2]))[:500] if starts else describe(error)


def _shut_down(ray: Any, others: set[psutil.Process]) -> None:
    """Stop a Ray of this machine. Workers outlive Ray's own processes by some seconds, and keep their memory."""
    started = _descendants() - others
    ray.shutdown()
    for process in psutil.wait_procs(started, timeout=STOP_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))
