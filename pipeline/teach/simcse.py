"""Unsupervised SimCSE (Gao et al. 2021): the two readings of a text under dropout are each other's positive, the other
texts of the batch its negatives.

Every text of a batch is a negative of every other, whatever fits into memory at once: the vectors of all are made
first, the loss gives the gradient of each vector, and each pass is then run again, with the same dropout, to bring it
to the weights (gradient caching, Gao et al. 2021b). Where one pass holds the batch it is run once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.pooling import pooled_states
from pipeline.embed.teachers.template import Tokens
from pipeline.optim.batching import parts
from pipeline.teach.dropout import Noise

if TYPE_CHECKING:
    import torch

READINGS = 2


def contrastive_loss(first: "torch.Tensor", second: "torch.Tensor", scale: float) -> "torch.Tensor":
    """Mean cross-entropy of finding row i of `second` for row i of `first` by scaled cosine.

    Args:
        first: `[B, d]`.
        second: `[B, d]`.
        scale: of the cosines.
    """
    import torch
    import torch.nn.functional as F

    cosines = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T
    return F.cross_entropy(scale * cosines, torch.arange(len(first), device=first.device))


class SimcseObjective:
    """Gradients of the contrastive loss of a batch."""

    def __init__(
        self, body: Any, noise: Noise, rows: Sequence[Tokens], *, scale: float, micro_batch_size: int, seed: int
    ) -> None:
        """Take a loaded model.

        Args:
            body: bidirectional, with the adapters that are trained.
            noise: its dropout.
            rows: all texts, distinct.
            scale: of the cosines.
            micro_batch_size: rows of a forward pass.
            seed: of the dropout.

        Raises:
            TeacherError: no module drops anything, or dropout changes nothing, or it is on outside of training.
        """
        self.body, self.noise, self._rows = body, noise, rows
        self._scale, self._size, self._seed = scale, micro_batch_size, seed
        self._check_noise()

    def gradients(self, rows: Sequence[int], step: int) -> float:
        """Add the gradients of one batch to the adapters; returns its loss."""
        import torch

        chunks = parts(rows, self._size)
        passes = [(reading, part) for reading in range(READINGS) for part in range(len(chunks))]
        if len(chunks) == 1:
            first, second = (self._read(chunks[0], step, reading, 0) for reading in range(READINGS))
            loss = contrastive_loss(first, second, self._scale)
            loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())
        # Not under no_grad: a GPU may then choose another attention kernel, which draws another dropout.
        vectors = [self._read(chunks[part], step, reading, part).detach() for reading, part in passes]
        leaves = [vector.requires_grad_(True) for vector in vectors]
        first, second = (torch.cat(leaves[at * len(chunks) : (at + 1) * len(chunks)]) for at in range(READINGS))
        loss = contrastive_loss(first, second, self._scale)
        loss.backward()  # type: ignore[no-untyped-call]
        for leaf, (reading, part) in zip(leaves, passes, strict=True):
            self._read(chunks[part], step, reading, part).backward(leaf.grad)  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def _read(self, rows: Sequence[int], step: int, reading: int, part: int) -> "torch.Tensor":
        with self.noise.drawing(self._seed, step, reading, part):
            return self.vectors(rows)

    def vectors(self, rows: Sequence[int]) -> "torch.Tensor":
        """`[B, d]` float32: the mean over each text's own tokens, as the teacher pools them."""
        return pooled_states(self.body, [self._rows[row] for row in rows])

    def _check_noise(self) -> None:
        import torch

        rows = list(range(min(2, len(self._rows))))
        with torch.no_grad():
            once, again = (self._read(rows, 0, reading, 0) for reading in range(READINGS))
            plain, same = self.vectors(rows), self.vectors(rows)
        # LoRA's own dropout shows only when the second matrices have left zero.
        if not self.noise.active or (torch.equal(once, again) and set(self.noise.active) != {"lora"}):
            raise TeacherError(
                "teach.simcse.dropout: the two readings of a text are the same "
                f"(dropout {self.noise.rate:g}, modules that drop: {self.noise.active or 'none'}), so there is nothing "
                "to learn: raise it, or teach.simcse.lora.dropout where the architecture has none of its own"
            )
        if not torch.equal(plain, same):
            raise TeacherError("teach.simcse: the backbone drops out of training too: its embeddings are not fixed")
