"""GPUs by their data sheets: inputs of estimates of time."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Gpu:
    """One GPU as its maker describes it.

    Attributes:
        flops: dense bfloat16 operations a second (without sparsity, sums in float32).
        bandwidth: bytes a second of its memory.
        memory: bytes.
        source: where the numbers stand.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 989e12, 4.8e12, 141e9, "NVIDIA H200 data sheet, SXM"),
        Gpu("H100", 989e12, 3.35e12, 80e9, "NVIDIA H100 data sheet, SXM"),
        Gpu("A100", 312e12, 2.039e12, 80e9, "NVIDIA A100 80GB data sheet, SXM"),
        Gpu("4090", 165.2e12, 1.008e12, 24e9, "NVIDIA Ada GPU architecture white paper, GeForce RTX 4090"),
    )
}


def gpu_at_hand() -> Gpu | None:
    """The first visible GPU, with the memory that it has; None without one, or if the table lacks it."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    known = next((gpu for name, gpu in GPUS.items() if name in found.name), None)
    return None if known is None else replace(known, memory=float(found.total_memory))
