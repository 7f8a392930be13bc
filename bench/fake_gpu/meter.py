"""What runs on the fake GPU: kernels, copies, live bytes, operations and bytes moved, by phase of the work."""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.optim.gpus import GPUS

# Operators that launch nothing: they give another view of memory, allocate it, or read sizes.
_NO_KERNEL = {
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "device", "empty",
    "empty_like", "empty_strided", "expand", "is_same_size", "item", "lift_fresh", "narrow", "new_empty",
    "new_empty_strided", "permute", "reshape", "select", "size", "slice", "split", "split_with_sizes", "squeeze",
    "stride", "sym_size", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
_COPIES = {"_to_copy", "copy_", "to"}
_READS = {"_local_scalar_dense", "item", "nonzero"}
_LOOKUPS = {"embedding", "gather", "index", "index_select"}
# What the host reads of a fake tensor, by type: a mask that pads, the first id, a difference small but not zero.
ANSWERS: dict[type, bool | int | float] = {bool: False, int: 0, float: 1e-4}
# Operations and bytes a second, and what a launch costs the host.
H100 = {"flops": GPUS["H100"].flops, "bandwidth": GPUS["H100"].bandwidth, "launch": 4e-6}


@dataclass(frozen=True)
class Kernel:
    """One launch: its phase and operator, floating-point operations, and bytes read and written."""

    phase: str
    name: str
    flops: int
    bytes: int


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is active.

    Attributes:
        live: bytes of the device's tensors that are alive.
        peak: the most that were alive since `reset`.
        kernels: launches since `reset`.
        h2d: copies to the device since `reset`, by phase.
        d2h: copies and reads from the device since `reset`, by phase; each makes the host wait.
    """

    def __init__(self) -> None:
        """Nothing is alive yet; `add` what was made before."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self._alive: dict[int, int] = {}
        self._phase = ""
        self.reset()

    def reset(self) -> None:
        """Count from here; what is alive stays alive."""
        self.peak = self.live
        self.kernels: list[Kernel] = []
        self.h2d: Counter[str] = Counter()
        self.d2h: Counter[str] = Counter()

    def phase(self, name: str) -> None:
        """What follows belongs to this phase."""
        self._phase = name

    def add(self, tensor: Any) -> None:
        """Count a tensor's memory until it is freed."""
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self.live += self._alive[key]
            weakref.finalize(storage, self._drop, key)
            self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        self.live -= self._alive.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count it."""
        name = func._schema.name.split("::")[-1]
        if name == "_local_scalar_dense" and isinstance(args[0], FakeTensor):
            self.read(args[0])
            return ANSWERS[_type(args[0].dtype)]
        # In inference mode operators that are made of others arrive whole.
        if func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        out = func(*args, **(kwargs or {}))
        read = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in written:
            self.add(tensor)
        self._count_copies(name, _kinds(read), _kinds(written))
        if "cuda" in _kinds(read) | _kinds(written) and name not in _NO_KERNEL and not func.is_view:
            flops = _flops(func, args, kwargs or {}, out)
            self.kernels.append(Kernel(self._phase, name, flops, _bytes_moved(name, read, written)))
        return out

    def read(self, tensor: Any) -> None:
        """Count that the host reads a tensor's values."""
        self.d2h[self._phase] += tensor.device.type == "cuda"

    def _count_copies(self, name: str, read: set[str], written: set[str]) -> None:
        if name in _COPIES and "cpu" in read and "cuda" in written:
            self.h2d[self._phase] += 1
        if "cuda" in read and (name in _READS or (name in _COPIES and "cpu" in written)):
            self.d2h[self._phase] += 1

    def summary(self) -> dict[str, Any]:
        """The counts since `reset`, the peak in GB, and the seconds of a roofline of an H100."""
        return {
            "kernels": len(self.kernels),
            "h2d": sum(self.h2d.values()),
            "d2h": sum(self.d2h.values()),
            "peak_gb": round(self.peak / 1e9, 2),
            "h100_seconds": round(self.seconds(**H100), 4),
        }

    def seconds(self, *, flops: float, bandwidth: float, launch: float) -> float:
        """A roofline: each kernel takes its operations or its bytes, whichever is slower, or the host's launch.

        Args:
            flops: of the device in a second.
            bandwidth: bytes that the device moves in a second.
            launch: seconds that the host needs to launch a kernel.
        """
        return sum(max(kernel.flops / flops, kernel.bytes / bandwidth, launch) for kernel in self.kernels)


def _type(dtype: torch.dtype) -> type:
    if dtype == torch.bool:
        return bool
    return float if dtype.is_floating_point else int


def _kinds(tensors: list[torch.Tensor]) -> set[str]:
    return {tensor.device.type for tensor in tensors}


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    formula = flop_registry.get(func._overloadpacket) or flop_registry.get(func)
    return int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0


def _bytes_moved(name: str, read: list[torch.Tensor], written: list[torch.Tensor]) -> int:
    if name in _LOOKUPS:
        return 2 * _bytes(written)
    return _bytes(read) + _bytes(written)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == "cuda")
