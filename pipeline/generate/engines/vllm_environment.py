"""What vLLM needs of the machine: the environment variables that it reads, and what its GPUs and memory say."""

import logging
import os
from typing import Any

import psutil

from pipeline.backbone.device import best_device
from pipeline.core.errors import EngineError
from pipeline.generate.engines.checks import describe
from pipeline.generate.engines.vllm_defaults import Gpu
from pipeline.parallel.devices import own_cores, visible_gpus

log = logging.getLogger(__name__)

# What decides how many threads compute on a CPU, and where.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "VLLM_CPU_OMP_THREADS_BIND",
)
SPIN_COUNT = "10000"
# Below this, vLLM's batch-invariant kernels do not run.
BATCH_INVARIANT_CAPABILITY = (8, 0)


def prepare_environment() -> None:
    """Set what OpenMP and CUDA read when torch is first imported. What the user set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that spin for ever starve each other as soon as anything else runs; ones that never spin lose a
        # quarter of the time to waking up (docs/results-log.md). A few microseconds cover the usual wait.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    # Looking for a GPU must not start CUDA in this process: vLLM's own processes could not start it again.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # Without a number vLLM falls back to one thread on the CPU.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(own_cores())))


def set_environment(on_gpu: bool, batch_invariant: bool) -> None:
    """Set what vLLM reads when it is imported. What the user set stays."""
    prepare_environment()
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if not on_gpu:
        log.info("engine vllm: no GPU found: on the CPU, in this process (less memory)")
        bound = ", ".join(f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ)
        log.info("engine vllm: threads: %s (cores: %d; these variables can be set)", bound, len(own_cores()))
        defaults["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    else:
        # A forked engine process would inherit the lock of the store, and hold it when this one is killed.
        defaults["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"


def check_batch_invariance() -> None:
    """Raises EngineError unless vLLM's batch-invariant kernels run here; to be called after `set_environment`."""
    if best_device() != "cuda":
        raise EngineError(
            "generate.batch_invariant: vLLM's batch-invariant kernels need a GPU, and none is found. On a CPU set it "
            "to false and generate.dtype: float32, whose greedy answers hardly ever depend on the batch"
        )
    from vllm.platforms import current_platform

    if current_platform.is_cuda() and not current_platform.has_device_capability(BATCH_INVARIANT_CAPABILITY):
        found, needed = current_platform.get_device_capability(), BATCH_INVARIANT_CAPABILITY
        raise EngineError(
            f"generate.batch_invariant: this GPU has compute capability {found.major}.{found.minor}, vLLM's "
            f"batch-invariant kernels need {needed[0]}.{needed[1]}: set it to false, or generate.dtype: float32"
        )


def fullest_gpu(count: int) -> Gpu | None:
    """Of the first `count` visible GPUs the one with the least free memory; asks NVML, so no CUDA context is made."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
        try:
            infos = [_nvml_memory(pynvml, name) for name in visible_gpus()[:count]]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        log.warning("engine vllm: the GPU's memory cannot be asked for (%s)", describe(error))
        return None
    return min((Gpu(int(info.total), int(info.free)) for info in infos), key=lambda gpu: gpu.free)


def _nvml_memory(pynvml: Any, name: str) -> Any:
    handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
    return pynvml.nvmlDeviceGetMemoryInfo(handle)


def free_memory(share: float) -> int:
    """Bytes of a CPU machine's memory that one of several equal engines may count on."""
    return int(psutil.virtual_memory().available * share)
