"""Contrastive refinement of the closed form on hidden states in memory, no backbone in sight.

Ridge regression brings a prediction near its own target; what a search needs is that it is nearer than all others.
InfoNCE (van den Oord et al. 2018) asks for that: with unit predictions p and unit targets t of the rows of a batch,

    loss = mean_i -log( exp(p_i t_i / tau) / sum_j exp(p_i t_j / tau) ) + pull * mean_i (1 - p_i p0_i)

p0 is the closed form's prediction. A row j whose target is nearly that of i (cosine above `duplicate`) is no negative
of i. Lengths play no part, so predictions get the closed form's mean length back at the end.
"""

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.run import progress
from pipeline.encoder.student import Student
from pipeline.train.params import RefineParams
from pipeline.train.ridge import LinearMap

log = logging.getLogger(__name__)


def refine_alignment(student: Student, rows: tuple[np.ndarray, np.ndarray], params: RefineParams, *, seed: int) -> None:
    """Refine the alignment projection of a student in closed form; the reconstruction stays.

    Args:
        student: changed in place.
        rows: hidden states `[N, d]`, each the mean over the compression tokens, and targets `[N, e]`.
    """
    hidden, targets = rows
    reconstruction, alignment = map(LinearMap.of_layer, (student.reconstruction, student.alignment))
    device = str(student.alignment.weight.device)
    refine(alignment, reconstruction(hidden), targets, params, seed=seed, device=device).write_to(student.alignment)


def refine(
    start: LinearMap, features: np.ndarray, targets: np.ndarray, params: RefineParams, *, seed: int, device: str = "cpu"
) -> LinearMap:
    """The closed form `start`, refined on features `[N, d]` and their targets `[N, e]`; both stay in memory.

    Fewer rows than `batch_size` are one batch.
    """
    mean, spread = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    spread = np.where(spread > 1e-9, spread, 1.0)  # a feature that never varies explains nothing
    inputs = _tensor((features - mean) / spread, device)
    wanted = F.normalize(_tensor(targets, device))
    weight, bias = (_tensor(part, device) for part in (start.weight * spread, start(mean)))
    with torch.no_grad():
        before = inputs @ weight.T + bias
    with torch.enable_grad(), torch.inference_mode(False):
        weight, bias = _descend(weight.clone(), bias.clone(), inputs, F.normalize(before), wanted, params, seed)
    with torch.no_grad():
        after = inputs @ weight.T + bias
        scale = float(before.norm(dim=1).mean() / after.norm(dim=1).mean())
    moved = weight.cpu().numpy().astype(np.float64) * scale / spread
    return LinearMap(moved, bias.cpu().numpy().astype(np.float64) * scale - moved @ mean)


def _descend(
    weight: Tensor, bias: Tensor, inputs: Tensor, before: Tensor, wanted: Tensor, params: RefineParams, seed: int
) -> tuple[Tensor, Tensor]:
    trained = [part.requires_grad_() for part in (weight, bias)]
    rate = params.learning_rate * float(weight.detach().square().mean().sqrt())
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    draws, total = np.random.default_rng(seed), params.steps
    size = min(params.batch_size, len(inputs))
    for step in progress(range(total), total=total, desc="refine", unit="step"):
        rows = torch.from_numpy(draws.choice(len(inputs), size, replace=False)).to(inputs.device)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / total)
        predicted = F.normalize(inputs[rows] @ weight.T + bias)
        loss = info_nce(predicted, wanted[rows], params.temperature, params.duplicate)
        loss = loss + params.pull * (1 - (predicted * before[rows]).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    log.info("refined over %d rows: loss %.4f in the last batch", len(inputs), float(loss.detach()))
    return weight.detach(), bias.detach()


def info_nce(predicted: Tensor, targets: Tensor, temperature: float, duplicate: float) -> Tensor:
    """Mean cross-entropy of the own target among those of the batch; both `[B, e]` of unit length.

    Targets with a cosine above `duplicate` to the own one are left out.
    """
    logits = predicted @ targets.T / temperature
    others = ~torch.eye(len(targets), dtype=torch.bool, device=targets.device)
    logits = logits.masked_fill((targets @ targets.T > duplicate) & others, float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(targets), device=targets.device))


def _tensor(values: np.ndarray, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
