"""The loss of the paper: `align_weight * MSE(embedding, target) + recon_weight * CE(response | soft prompts)`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from pipeline.backbone.device import exact_dtype, sent
from pipeline.encoder.passes.plain import Passes, Pooled
from pipeline.encoder.student import Student

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass: prompt ids, response ids (EOS included), targets float32 `[B, e]`, what is pooled."""

    query_ids: Sequence[Sequence[int]]
    response_ids: Sequence[Sequence[int]]
    targets: Tensor
    pooled: Pooled | None = None

    @property
    def response_tokens(self) -> int:
        """Response tokens that the reconstruction loss predicts."""
        return sum(len(ids) for ids in self.response_ids)


@dataclass(frozen=True)
class LossSums:
    """Sums over a batch: those of batches of any size add up exactly."""

    align: Tensor
    recon: Tensor
    rows: int
    tokens: int


def alignment_sum(embeddings: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    """Squared error summed over rows; within a row the mean (paper) or the sum over dimensions.

    The scale of the targets decides what this weighs beside the cross-entropy: for unit-length targets of e
    dimensions the mean is e times smaller than the sum, and the alignment hardly trains. Both tensors are `[B, e]`.
    """
    squared = (embeddings - targets.to(embeddings)).square()
    return squared.mean(-1).sum() if reduction == "mean" else squared.sum()


def loss_sums(
    student: Student, passes: Passes, batch: Batch, reduction: Reduction, *, reconstruct: bool = True
) -> LossSums:
    """Both losses of a batch from one query pass and one response pass.

    With `reconstruct` False the response pass is left out, and the reconstruction loss is 0.
    """
    soft_prompts, align = _query_side(student, passes, batch, reduction)
    if not reconstruct:
        return LossSums(align, align.new_zeros(()), len(batch.query_ids), batch.response_tokens)
    recon, tokens = passes.response_pass(soft_prompts, batch.response_ids)
    return LossSums(align, recon, len(batch.query_ids), tokens)


def _query_side(student: Student, passes: Passes, batch: Batch, reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Soft prompts `[B, n, d]` and the sum of the alignment loss, from one query pass."""
    states = passes.query_pass(batch.query_ids, student.tokens, student.compression_tokens, batch.pooled)
    soft_prompts, embeddings = student(states)
    return soft_prompts, alignment_sum(embeddings, sent(batch.targets, states.device), reduction)


def add_gradients(
    student: Student,
    passes: Passes,
    batch: Batch,
    sizes: Sequence[int],
    reduction: Reduction,
    *,
    align: float,
    recon: float,
    reconstruct: bool = True,
) -> Tensor:
    """Add the gradients of `align` times the alignment loss and `recon` times the reconstruction loss of a batch.

    One query pass reads the whole batch; its rows are reconstructed `sizes` at a time, each response pass with its own
    backward pass. The gradients of all soft prompts then go through the query pass at once: a sum's gradient is the sum
    of the gradients, so this equals any other grouping up to rounding.

    Returns:
        The sums of both losses over the batch, `[2]` in `exact_dtype`, on the device.
    """
    soft_prompts, align_sum = _query_side(student, passes, batch, reduction)
    tensors: list[Tensor] = [align * align_sum]
    gradients: list[Tensor | None] = [None]
    exact = exact_dtype(align_sum.device)
    recon_sum = align_sum.new_zeros((), dtype=exact)
    if reconstruct:
        parts = [part.detach().requires_grad_() for part in torch.split(soft_prompts, list(sizes))]
        starts = accumulate(sizes, initial=0)
        for part, start in zip(parts, starts, strict=False):
            summed, _ = passes.response_pass(part, batch.response_ids[start : start + len(part)])
            torch.autograd.backward(recon * summed)
            recon_sum += summed.detach()
        tensors.append(soft_prompts)
        gradients.append(torch.cat([part.grad for part in parts]))  # type: ignore[misc]
    torch.autograd.backward(tensors, gradients)
    return torch.stack([align_sum.detach().to(exact), recon_sum])
