"""Our training step: the passes that `train` uses, the same loss, the same update.

.venv/bin/python -m bench.training_step.ours --work DIR --dtype bf16 --device cpu --variant fast
"""

import argparse
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from bench.common import BACKBONE
from bench.training_step.child import Arrays, serve
from bench.training_step.workload import Rows
from pipeline.backbone.loading import BackboneParams, load_backbone
from pipeline.encoder.passes.select import make_passes
from pipeline.encoder.student import Student
from pipeline.train.losses import Batch, loss_sums

VARIANTS: dict[str, dict[str, Any]] = {"fast": {}, "lean": {"checkpoint_responses": True}}
# The backbone's precisions; float64 is for the comparison alone and starts from float32.
LOADED = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float32"}


class Ours:
    """One frozen backbone, the student, and AdamW."""

    def __init__(self, settings: argparse.Namespace) -> None:
        """Args: settings: of the child process; the workspace holds the student and the teacher's targets."""
        params = BackboneParams(name=str(BACKBONE), dtype=LOADED[settings.dtype])  # type: ignore[arg-type]
        backbone = load_backbone(params, settings.device)
        exact = settings.dtype == "fp64"
        if exact:
            backbone.double()
        weights = load_file(settings.work / "student.safetensors")
        count, hidden = weights["tokens"].shape
        self._student = Student(hidden, weights["alignment.weight"].shape[0], count)
        self._student.load_state_dict(weights)
        self._student.to(settings.device, torch.float64 if exact else torch.float32)
        self._passes = make_passes(backbone, **VARIANTS[settings.variant])
        with np.load(settings.work / f"targets-{settings.dtype}.npz") as found:
            self._targets = [torch.from_numpy(found[name]).to(self._student.tokens) for name in found.files]
        self._optimizer = torch.optim.AdamW(self._student.parameters(), lr=5e-4)

    def step(self, index: int, rows: Rows) -> float:
        """See `Side.step`."""
        loss = self._forward_backward(index, rows)
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def gradients(self, index: int, rows: Rows) -> tuple[float, Arrays]:
        """See `Side.gradients`."""
        loss = self._forward_backward(index, rows)
        named = self._student.named_parameters()
        return loss, {name: parameter.grad.cpu().numpy() for name, parameter in named if parameter.grad is not None}

    def targets(self, rows: Rows) -> "np.ndarray[Any, Any]":
        """Ours come from a file, as `embed` wrote it."""
        raise NotImplementedError

    def _forward_backward(self, index: int, rows: Rows) -> float:
        batch = Batch(rows.query_ids, rows.response_ids, self._targets[index])
        sums = loss_sums(self._student, self._passes, batch, "mean")
        loss = sums.align / sums.rows + sums.recon / sums.tokens
        torch.autograd.backward(loss)
        return loss.item()


if __name__ == "__main__":
    serve(Ours)
