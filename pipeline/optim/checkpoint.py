"""Checkpoints of a training run: one file, safetensors behind its own sha256, no pickle."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeline.core.errors import TrainingError
from pipeline.core.fault_points import fault_point
from pipeline.core.files import bytes_sha256, disk_errors, write_bytes

log = logging.getLogger(__name__)

_SLOTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(
    path: Path,
    trained: Mapping[str, Parameter],
    optimizer: Optimizer,
    progress: Mapping[str, Any],
    kept: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one atomic file that checks itself.

    `optimizer` is AdamW over the trained tensors, `progress` serialises to JSON, `kept` are further tensors.
    """
    tensors = {f"trained.{name}": parameter.detach() for name, parameter in trained.items()}
    tensors |= {f"kept.{name}": tensor for name, tensor in (kept or {}).items()}
    for name, parameter in trained.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{slot}.{name}": state[slot] for slot in _SLOTS if slot in state}
    content = save(
        {name: value.cpu().contiguous() for name, value in tensors.items()}, {"progress": json.dumps(progress)}
    )
    fault_point("checkpoint.commit")
    with disk_errors(path):
        write_bytes(path, bytes_sha256(content).encode() + content)
    fault_point("checkpoint.committed")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    progress: dict[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def kept(self) -> dict[str, Tensor]:
        """The `kept` of `save_checkpoint`."""
        return {name.removeprefix("kept."): value for name, value in self.tensors.items() if name.startswith("kept.")}

    def restore(self, trained: Mapping[str, Parameter], optimizer: Optimizer) -> None:
        """Restore the trained tensors and AdamW's state; TrainingError if the checkpoint holds other tensors."""
        _check_tensors(self.path, self.tensors, trained)
        for name, parameter in trained.items():
            parameter.data.copy_(self.tensors[f"trained.{name}"])
            state = {slot: self.tensors[f"{slot}.{name}"] for slot in _SLOTS if f"{slot}.{name}" in self.tensors}
            if state:
                optimizer.state[parameter] = {slot: value.to(parameter.device) for slot, value in state.items()}


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a file; None, with a warning where the file is damaged, if there is no intact one."""
    if not path.is_file():
        return None
    raw = path.read_bytes()
    digest, content = raw[:64], raw[64:]
    if bytes_sha256(content).encode() != digest:
        log.warning("%s is damaged: training starts again", path)
        return None
    return Checkpoint(path, _progress(content), load(content))


def _progress(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["progress"])


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], trained: Mapping[str, Parameter]) -> None:
    found = {name: tuple(value.shape) for name, value in tensors.items() if name.startswith("trained.")}
    wanted = {f"trained.{name}": tuple(value.shape) for name, value in trained.items()}
    other = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if other:
        name = other[0]
        raise TrainingError(
            f"{path} is a checkpoint of other params: {name.removeprefix('trained.')} has shape {found.get(name)} "
            f"there, {wanted.get(name)} here. Set the params it was made with, or delete it"
        )
