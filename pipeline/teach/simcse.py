"""Unsupervised SimCSE (Gao et al. 2021): the two views of a text under dropout are each other's positive, the other
texts of the batch are the negatives.

Negatives come from the whole batch, also where it does not fit into one forward pass: all vectors are computed first,
the loss gives the gradient of each, and each pass is run again with the same dropout to propagate it to the weights
(gradient caching, Gao et al. 2021b). Where one pass holds the batch it is run once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.pooling import pooled_states
from pipeline.embed.teachers.template import Tokens
from pipeline.optim.batching import parts
from pipeline.teach.dropout import SeededDropout

if TYPE_CHECKING:
    import torch

VIEWS = 2


def contrastive_loss(first: "torch.Tensor", second: "torch.Tensor", scale: float) -> "torch.Tensor":
    """Mean cross-entropy of finding row i of `second` `[B, d]` for row i of `first` `[B, d]` by scaled cosine."""
    import torch
    import torch.nn.functional as F

    cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T
    return F.cross_entropy(scale * cosines, torch.arange(len(first), device=first.device))


@dataclass
class SimcseObjective:
    """Gradients of the contrastive loss of a batch.

    Attributes:
        body: bidirectional, with the trained adapters.
        dropout: of the body, drawn from `seed`.
        rows: all texts, distinct.
        scale: of the cosines.
        micro_batch_size: rows of a forward pass.
    """

    body: Any
    dropout: SeededDropout
    rows: Sequence[Tokens]
    scale: float
    micro_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        """Raises TeacherError if dropout changes nothing, or is on outside of training."""
        import torch

        rows = list(range(min(2, len(self.rows))))
        with torch.no_grad():
            once, again = (self._view(rows, 0, view, 0) for view in range(VIEWS))
            plain, same = self.vectors(rows), self.vectors(rows)
        # LoRA's dropout has no effect while the second matrices are zero.
        active, rate = self.dropout.active, self.dropout.rate
        if not active or (torch.equal(once, again) and set(active) != {"lora"}):
            raise TeacherError(
                f"{rate:g} leaves the two views of a text equal (modules that drop: {active or 'none'}): raise it, or "
                "lora.dropout where the architecture has no dropout",
                argument="dropout",
            )
        if not torch.equal(plain, same):
            raise TeacherError("the backbone drops outside of training too: its embeddings are not deterministic")

    def gradients(self, rows: Sequence[int], step: int) -> float:
        """See `Objective`."""
        import torch

        chunks = parts(rows, self.micro_batch_size)
        passes = [(view, part) for view in range(VIEWS) for part in range(len(chunks))]
        if len(chunks) == 1:
            first, second = (self._view(chunks[0], step, view, 0) for view in range(VIEWS))
            loss = contrastive_loss(first, second, self.scale)
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())
        # Not under no_grad: a GPU may then choose another attention kernel, which draws another dropout.
        vectors = [self._view(chunks[part], step, view, part).detach() for view, part in passes]
        leaves = [vector.requires_grad_(True) for vector in vectors]
        first, second = torch.cat(leaves).chunk(VIEWS)
        loss = contrastive_loss(first, second, self.scale)
        loss.backward()  # type: ignore[no-untyped-call]
        for leaf, (view, part) in zip(leaves, passes, strict=True):
            self._view(chunks[part], step, view, part).backward(leaf.grad)  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _view(self, rows: Sequence[int], step: int, view: int, part: int) -> "torch.Tensor":
        with self.dropout.enabled(self.seed, step, view, part):
            return self.vectors(rows)

    def vectors(self, rows: Sequence[int]) -> "torch.Tensor":
        """`[B, d]` float32, pooled as the teacher does."""
        return pooled_states(self.body, [self.rows[row] for row in rows])
