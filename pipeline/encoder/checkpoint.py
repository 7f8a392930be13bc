"""Checkpoints of a training run: one file, safetensors behind its own sha256, no pickle."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch.optim import Optimizer

from pipeline.artifacts import bytes_sha256, disk_errors, write_bytes
from pipeline.encoder.student import Student

_SLOTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(path: Path, student: Student, optimizer: Optimizer, progress: dict[str, Any]) -> None:
    """Write student, AdamW state and `progress` (JSON) as one atomic file that checks itself."""
    tensors = {f"student.{name}": value for name, value in student.state_dict().items()}
    for name, parameter in student.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{slot}.{name}": state[slot] for slot in _SLOTS if slot in state}
    content = save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {"progress": json.dumps(progress)}
    )
    with disk_errors(path):
        write_bytes(path, bytes_sha256(content).encode() + content)


def load_checkpoint(path: Path, student: Student, optimizer: Optimizer) -> dict[str, Any] | None:
    """Restore a checkpoint in place and return its `progress`; None where there is no intact one."""
    if not path.is_file():
        return None
    raw = path.read_bytes()
    digest, content = raw[:64], raw[64:]
    if bytes_sha256(content).encode() != digest:
        return None
    return _restore(content, student, optimizer)


def _restore(content: bytes, student: Student, optimizer: Optimizer) -> dict[str, Any]:
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    progress = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["progress"])
    student.load_state_dict({name: tensors[f"student.{name}"] for name in student.state_dict()})
    for name, parameter in student.named_parameters():
        state = {slot: tensors[f"{slot}.{name}"] for slot in _SLOTS if f"{slot}.{name}" in tensors}
        if state:
            optimizer.state[parameter] = {
                slot: value if slot == "step" else value.to(parameter.device) for slot, value in state.items()
            }
    return progress
