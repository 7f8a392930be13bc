"""The device that models run on, and why a GPU that should be there is not usable.

A CUDA build of torch without a usable GPU is a fault of the machine, not a wish for the CPU: a run must not learn after
six hours that it was on the CPU. `PIPELINE_DEVICE=cpu` runs there on purpose.
"""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.core.errors import BackboneError, describe
from pipeline.core.run import DEVICE_VARIABLE

if TYPE_CHECKING:
    import torch

# The first NVIDIA driver that runs programs built for a CUDA major version.
OLDEST_DRIVER = {"13": 580, "12": 525}


def best_device() -> str:
    """`$PIPELINE_DEVICE` where it is set; else `cuda` where torch can use a GPU, else `cpu`.

    Raises:
        BackboneError: torch is a CUDA build and cannot use a GPU, or the variable names no device that it can use.
    """
    import torch

    if wanted := os.environ.get(DEVICE_VARIABLE):
        check_usable(wanted)
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    if problem := cuda_problem():
        raise BackboneError(f"{problem}; {DEVICE_VARIABLE}=cpu runs on the CPU on purpose")
    return "cpu"


def check_usable(device: str) -> None:
    """Raises BackboneError if torch cannot use a device. Nothing is put on it, which would start CUDA here."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise BackboneError(f"{DEVICE_VARIABLE} is '{device}', which is no device: set cuda or cpu") from None
    if kind == "cuda" and not torch.cuda.is_available():
        reason = cuda_problem() or f"torch {torch.__version__} is a build without CUDA"
        raise BackboneError(f"{DEVICE_VARIABLE} is '{device}', and no GPU is usable: {reason}")


def cuda_problem() -> str | None:
    """Why this CUDA build of torch cannot use a GPU, with both versions; None where it can, or for another build."""
    import torch

    cuda = torch.version.cuda
    if cuda is None or torch.cuda.is_available():
        return None
    built = f"torch {torch.__version__} is built for CUDA {cuda}"
    needed = OLDEST_DRIVER.get(cuda.split(".")[0])
    needs = f", which needs NVIDIA driver {needed} or newer" if needed else ""
    driver = driver_version()
    if driver is None:
        return f"{built}{needs}, but no NVIDIA driver answers (nvidia-smi is missing or fails)"
    if needed and int(driver.split(".")[0]) < needed:
        return f"{built}{needs}, but the driver is {driver}: update it"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = f" (CUDA_VISIBLE_DEVICES is '{visible}')" if visible is not None else ""
    return f"{built}{needs}; the driver is {driver}, but torch finds no usable GPU{hidden}"


def driver_version() -> str | None:
    """The NVIDIA driver's version as nvidia-smi prints it; None where it prints none."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split() if done.returncode == 0 else []
    return lines[0] if lines and lines[0][0].isdigit() else None


def release_memory() -> None:
    """Free models that are out of scope (their modules refer to each other in cycles), for other processes too."""
    if torch := sys.modules.get("torch"):
        gc.collect()
        torch.cuda.empty_cache()  # does nothing before CUDA is used


def check_device(device: str) -> None:
    """Raises BackboneError unless torch can use this device here."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by the kind of device
        raise BackboneError(f"{device} cannot be used here: {describe(error)}", argument="device") from None


def exact_dtype(device: "torch.device") -> "torch.dtype":
    """For sums: float64, or float32 on Apple's GPU, which has none."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def to_device(tensors: "Sequence[torch.Tensor]", device: "torch.device") -> "list[torch.Tensor]":
    """One-dimensional int64 tensors of the host on `device`, in one copy that a GPU does not wait for."""
    import torch

    moved = sent(torch.cat(list(tensors)), device)
    return list(torch.split(moved, [len(tensor) for tensor in tensors]))


def sent(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """A tensor of the host on `device`, by a copy that the host does not wait for."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
