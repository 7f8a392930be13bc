"""Ray clusters: options, connection, how many engines run on what, and the engines' arguments."""

import logging
import math
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import psutil
from pydantic import Field

from pipeline.backbone.loading import BackboneParams
from pipeline.core.config import Params
from pipeline.core.errors import EngineError, describe
from pipeline.generate.engines.checks import parse_options
from pipeline.generate.engines.vllm import check_arguments, fixed_arguments
from pipeline.generate.engines.vllm_defaults import CPU_KV_CACHE_BYTES, CPU_SEQUENCES, GPU_SEQUENCES
from pipeline.generate.engines.vllm_environment import QUIET, set_defaults

log = logging.getLogger(__name__)

# With fewer logical CPUs beside the engines' own, Ray Data deadlocks silently.
SPARE_CPUS = 3
STOP_SECONDS = 10.0
RAY_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


class RayOptions(Params):
    """The options that are not vLLM's."""

    address: str | None = Field(default=None, description="auto, ray://..., host:port; null = $RAY_ADDRESS or local")
    replicas: int | None = Field(default=None, ge=1, description="engines; null = as many as the GPUs allow")
    chunk_rows: int = Field(default=32, ge=1, description="rows that go to an engine and come back together")
    num_cpus: int | None = Field(default=None, ge=1, description="logical CPUs of a local Ray; null = enough")
    env: dict[str, str] = Field(default_factory=dict, description="environment variables of the engines")
    timeout_seconds: float = Field(default=3600.0, gt=0, description="longest wait for the next answer")


@dataclass(frozen=True)
class Layout:
    """How the engines lie on the cluster: `devices` each; `sequences` run at once in each."""

    on_gpu: bool
    devices: int
    replicas: int
    sequences: int
    chunk_rows: int

    @property
    def chunks_at_once(self) -> int:
        """Chunks that an engine works on: twice what runs at once, so that it stays busy during a chunk's last rows."""
        return max(2, math.ceil(2 * self.sequences / self.chunk_rows))

    @property
    def window_rows(self) -> int:
        """Rows on the cluster, waiting ones included."""
        return self.replicas * (self.chunks_at_once + 2) * self.chunk_rows


class Connection:
    """A connection to Ray, which is started if there is none."""

    def __init__(self) -> None:
        self._ours = False
        self._others = self._descendants()

    def open(self, options: RayOptions) -> None:
        """Connect to the cluster of the options or the environment, or start Ray on this machine.

        Raises:
            EngineError: Ray is not installed, or the cluster cannot be reached.
        """
        ray = import_ray()
        if ray.is_initialized():
            return
        address = options.address or os.environ.get("RAY_ADDRESS") or "local"
        local = {"num_cpus": options.num_cpus or enough_cpus(options), "include_dashboard": False}
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **(local if address == "local" else {}),
            )
        except Exception as error:
            # Ray raises many kinds here: no cluster, other version, no port, no memory for the object store.
            raise EngineError(f"no Ray at '{address}' ({describe(error)})", argument="options.address") from None
        self._ours = True
        log.info("engine ray: %s", "started on this machine" if address == "local" else f"cluster {address}")

    def resources(self) -> dict[str, float]:
        """The cluster's resources by Ray's names (CPU, GPU)."""
        import ray

        return dict(ray.cluster_resources())

    def close(self) -> None:
        """Leave the cluster; stop all processes of a Ray that was started here."""
        if not self._ours:
            return
        import ray

        started = self._descendants() - self._others
        ray.shutdown()
        # Workers outlive Ray's own processes by some seconds, and keep the memory of their engines.
        _, alive = psutil.wait_procs(started, timeout=STOP_SECONDS)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    @staticmethod
    def _descendants() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True))


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM: Ray's own, set by each `ray.init`, exits without our message."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, before)


def split_options(options: Mapping[str, Any]) -> tuple[RayOptions, dict[str, Any]]:
    """Options as Ray's and vLLM's.

    Raises:
        EngineError: an option is unknown, mistyped, or follows from other params.
    """
    arguments = {name: value for name, value in options.items() if name not in RayOptions.model_fields}
    ours = parse_options({name: value for name, value in options.items() if name not in arguments}, RayOptions)
    check_arguments(arguments, _known_arguments() if arguments else (), RayOptions.model_fields)
    return ours, arguments


def _known_arguments() -> set[str]:
    """Arguments of vLLM; none where this machine has no vLLM, as the head of a cluster may."""
    with suppress(ImportError):
        from vllm import AsyncEngineArgs

        return {field.name for field in fields(AsyncEngineArgs)}
    return set()


def import_ray() -> Any:
    """The package, with its logging off; raises EngineError if it is not installed."""
    set_defaults(RAY_QUIET | QUIET)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EngineError(
            f"ray cannot be imported ({describe(error)}): install it with `pip install -e .[ray]`", argument="engine"
        ) from None
    _quiet()
    return ray


def _quiet() -> None:
    for name in ("ray", "ray.data", "ray.llm", "ray._private.worker", "vllm"):
        # Their errors reach the user as an EngineError.
        logging.getLogger(name).setLevel(logging.CRITICAL)


def enough_cpus(options: RayOptions) -> int:
    """Logical CPUs of a local Ray: those of the machine, or more where it is small."""
    return max(os.cpu_count() or 1, (options.replicas or 1) + SPARE_CPUS)


def choose_layout(resources: Mapping[str, float], options: RayOptions, arguments: Mapping[str, Any]) -> Layout:
    """Engines for a cluster with these resources; each automatic choice is logged with its reason.

    Raises:
        EngineError: they do not fit.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    devices = int(arguments.get("tensor_parallel_size", 1)) * int(arguments.get("pipeline_parallel_size", 1))
    if gpus and devices > gpus:
        raise EngineError(
            f"one engine takes {devices} GPUs, the Ray cluster has {gpus}: lower it", argument="tensor_parallel"
        )
    replicas = options.replicas
    if replicas is None:
        replicas = gpus // devices or 1
        log.info("engine ray: replicas = %d (%d GPUs, %d for an engine)", replicas, gpus, devices)
    if gpus and replicas * devices > gpus:
        log.warning("engine ray: %d engines take %d GPUs, the cluster has %d now", replicas, replicas * devices, gpus)
    if cpus < replicas + SPARE_CPUS:
        raise EngineError(
            f"Ray has {cpus} logical CPUs, {replicas} engines need {replicas + SPARE_CPUS}: lower it, or raise "
            "num_cpus of a local Ray",
            argument="options.replicas",
        )
    sequences = int(arguments.get("max_num_seqs", GPU_SEQUENCES if gpus else CPU_SEQUENCES))
    return Layout(bool(gpus), devices, replicas, sequences, options.chunk_rows)


def processor_config(
    backbone: BackboneParams, max_model_len: int, layout: Layout, options: RayOptions, arguments: Mapping[str, Any]
) -> Any:
    """The configuration of `ray.data.llm` for these engines: token ids in, and no stage but the engine."""
    try:
        from ray.data.llm import vLLMEngineProcessorConfig
    except ImportError as error:
        raise EngineError(f"ray.data.llm cannot be imported ({describe(error)})", argument="engine") from None
    _quiet()  # importing it sets levels of its own
    return vLLMEngineProcessorConfig(
        model_source=_everywhere(backbone.name),
        engine_kwargs=engine_arguments(backbone, max_model_len, layout, arguments),
        batch_size=layout.chunk_rows,
        concurrency=(layout.replicas, layout.replicas),
        max_concurrent_batches=layout.chunks_at_once,
        placement_group_config={"bundles": [{"CPU": 1, "GPU": int(layout.on_gpu)}] * layout.devices},
        runtime_env={"env_vars": engine_environment(layout) | options.env},
        should_continue_on_error=True,
        log_engine_metrics=False,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def _everywhere(name: str) -> str:
    """A folder as its absolute path: the engines run in another working directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def engine_arguments(
    backbone: BackboneParams, max_model_len: int, layout: Layout, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs`."""
    automatic: dict[str, Any] = {"enable_prefix_caching": True, "max_num_seqs": layout.sequences}
    if not layout.on_gpu:
        automatic |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
    return automatic | dict(arguments) | fixed_arguments(backbone, max_model_len)


def engine_environment(layout: Layout) -> dict[str, str]:
    """Environment variables of the engines, which on other machines do not inherit this one's."""
    variables = QUIET | {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME") if name in os.environ}
    if layout.on_gpu:
        return variables
    threads = max(1, (os.cpu_count() or 1) // layout.replicas)
    return variables | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
