"""The loss of the paper: `align_weight * MSE(embedding, target) + recon_weight * CE(response | soft prompts)`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pipeline.encoder.passes.plain import Passes
from pipeline.encoder.student import Student

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass: prompt ids, response ids (EOS included), targets float32 `[B, e]`."""

    query_ids: Sequence[Sequence[int]]
    response_ids: Sequence[Sequence[int]]
    targets: Tensor

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
    hidden = passes.query_pass(batch.query_ids, student.tokens, student.compression_tokens)
    soft_prompts = student.soft_prompts(hidden)
    align = alignment_sum(student.embedding(soft_prompts), batch.targets, reduction)
    if not reconstruct:
        return LossSums(align, align.new_zeros(()), len(batch.query_ids), batch.response_tokens)
    recon, tokens = passes.response_pass(soft_prompts, batch.response_ids)
    return LossSums(align, recon, len(batch.query_ids), tokens)
