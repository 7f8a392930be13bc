"""The environment variables that vLLM reads, and the machine's GPUs and memory."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from pipeline.backbone.device import best_device
from pipeline.core.errors import EngineError, describe
from pipeline.core.run import own_cores, prepare_threads
from pipeline.generate.engines.vllm_defaults import Gpu
from pipeline.parallel.devices import visible_gpus

log = logging.getLogger(__name__)

# They decide how many threads compute on a CPU, and where.
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
# vLLM's batch-invariant kernels need at least this compute capability.
BATCH_INVARIANT_CAPABILITY = (8, 0)
QUIET = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
# Of several engines that share a CPU.
SHARED_CPU = {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set environment variables; the user's stay."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def prepare_environment() -> None:
    """Set variables that OpenMP and CUDA read when torch is first imported; the user's stay."""
    prepare_threads()
    set_defaults(
        {
            # Looking for a GPU must not start CUDA in this process: vLLM's own processes could not start it again.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            # Without a number vLLM falls back to one thread on the CPU.
            "OMP_NUM_THREADS": str(len(own_cores())),
        }
    )


def set_environment(on_gpu: bool, batch_invariant: bool) -> None:
    """Set variables that vLLM reads when it is imported; the user's stay."""
    prepare_environment()
    set_defaults(QUIET)
    # vLLM logs before it has read that variable.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    if on_gpu:
        # A forked engine process would inherit the lock of the store, and hold it when this one is killed.
        set_defaults({"VLLM_WORKER_MULTIPROC_METHOD": "spawn"})
    else:
        log.info("engine vllm: no GPU found: on the CPU, in this process (less memory)")
        threads = ", ".join(f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ)
        log.info("engine vllm: threads: %s (cores: %d; these variables can be set)", threads, len(own_cores()))
        set_defaults({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    if batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"


def check_batch_invariance() -> None:
    """Raises EngineError unless vLLM's batch-invariant kernels run here; to be called after `set_environment`."""
    if best_device() != "cuda":
        message = "vLLM's batch-invariant kernels need a GPU, and none is found: set it to false and dtype to float32"
        raise EngineError(message, argument="batch_invariant")
    from vllm.platforms import current_platform

    if current_platform.is_cuda() and not current_platform.has_device_capability(BATCH_INVARIANT_CAPABILITY):
        found, needed = current_platform.get_device_capability(), BATCH_INVARIANT_CAPABILITY
        numbers = f"{found.major}.{found.minor}, vLLM's batch-invariant kernels need {needed[0]}.{needed[1]}"
        message = f"this GPU has compute capability {numbers}: set it to false, or dtype to float32"
        raise EngineError(message, argument="batch_invariant")


def fullest_gpu(count: int) -> Gpu | None:
    """Of the first `count` visible GPUs the one with the least free memory, by NVML, so without a CUDA context."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
        try:
            infos = [_nvml_memory(pynvml, name) for name in nvml_names(pynvml, visible_gpus()[:count])]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        log.warning("engine vllm: the GPU's memory is not known (%s)", describe(error))
        return None
    return min((Gpu(int(info.total), int(info.free)) for info in infos), key=lambda gpu: gpu.free)


def nvml_names(pynvml: Any, names: Sequence[str]) -> Sequence[str]:
    """The GPUs that NVML can be asked for by these names.

    CUDA numbers the fastest GPU first, NVML by slot. Where a machine has GPUs of several kinds, and CUDA_DEVICE_ORDER
    does not say PCI_BUS_ID, a number means another GPU to each: all are looked at, for the least free memory.
    """
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or not all(name.isdigit() for name in names):
        return names
    everyone = [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
    kinds = {pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(int(index))) for index in everyone}
    return names if len(kinds) == 1 else everyone


def _nvml_memory(pynvml: Any, name: str) -> Any:
    handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
    return pynvml.nvmlDeviceGetMemoryInfo(handle)


def free_memory(share: float) -> int:
    """Bytes of a CPU machine's free memory for an engine that gets this share."""
    return int(psutil.virtual_memory().available * share)
