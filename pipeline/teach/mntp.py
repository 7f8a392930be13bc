"""Masked next-token prediction: a masked token is predicted from the position before it, with attention both ways.

So the model keeps its own way of predicting, the next token, while it learns to use what comes after. Only the masked
positions meet the output head: of a text of 512 tokens a fifth have logits, a few at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.backbone.prompting import pad_left
from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.pooling import hidden_states
from pipeline.embed.teachers.template import Tokens
from pipeline.optim.batching import parts
from pipeline.teach.dropout import Noise

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from pipeline.backbone.output_head import LogitTransform


def mask_token_id(tokenizer: "PreTrainedTokenizerBase", mask_token: str) -> int:
    """The id of the token that stands for what is hidden; the vocabulary stays as it is.

    Raises:
        TeacherError: the tokenizer has no such token, or makes several of it.
    """
    found = tokenizer.get_vocab().get(mask_token)
    ids = [found] if found is not None else tokenizer(mask_token, add_special_tokens=False)["input_ids"]
    name = f"teach.mntp.mask_token: {mask_token!r} of the tokenizer of '{tokenizer.name_or_path}'"
    if len(ids) != 1:
        raise TeacherError(f"{name} is {len(ids)} tokens, must be one: choose another, e.g. '_'")
    if ids[0] == tokenizer.unk_token_id and mask_token != tokenizer.unk_token:
        raise TeacherError(f"{name} is an unknown token: choose one that its vocabulary has, e.g. '_'")
    return int(ids[0])


def maskable(row: Tokens) -> list[int]:
    """Positions that may be masked: the text's own tokens, but not the first that is read, before which is nothing."""
    return [at for at in range(1, len(row.ids)) if row.pooled[at]]


@dataclass(frozen=True)
class Masked:
    """A row with tokens hidden.

    Attributes:
        ids: what is read.
        positions: of the hidden tokens, rising.
        labels: the hidden tokens.
    """

    ids: list[int]
    positions: list[int]
    labels: list[int]


def mask(row: Tokens, fraction: float, mask_id: int, seed: Sequence[int]) -> Masked:
    """Hide this share of the maskable tokens, at least one; which ones is a function of the seed."""
    import numpy as np

    candidates = maskable(row)
    count = max(1, round(fraction * len(candidates)))
    chosen = sorted(np.random.default_rng(list(seed)).choice(candidates, count, replace=False).tolist())
    hidden = set(chosen)
    ids = [mask_id if at in hidden else token for at, token in enumerate(row.ids)]
    return Masked(ids, chosen, [row.ids[at] for at in chosen])


def predicting(rows: Sequence[Masked]) -> list[int]:
    """For each hidden token of left-padded rows, the flat position that predicts it: one before its own."""
    width = max(len(row.ids) for row in rows)
    return [index * width + (width - len(row.ids)) + at - 1 for index, row in enumerate(rows) for at in row.positions]


class MntpObjective:
    """Gradients of the mean cross-entropy over the hidden tokens of a batch."""

    def __init__(
        self,
        body: Any,
        noise: Noise,
        rows: Sequence[Tokens],
        *,
        head: Any,
        shape: "LogitTransform",
        fraction: float,
        mask_id: int,
        micro_batch_size: int,
        seed: int,
    ) -> None:
        """Take a loaded model.

        Args:
            body: bidirectional, with the adapters that are trained.
            noise: its dropout.
            rows: all texts; each has a maskable token.
            head: the frozen output head, a linear layer.
            shape: what else the head does.
            fraction: of the maskable tokens, that are hidden.
            mask_id: stands for a hidden token.
            micro_batch_size: rows of a forward pass.
            seed: of masks and dropout.
        """
        self.body, self.noise, self._rows, self._head, self._shape = body, noise, rows, head, shape
        self._fraction, self._mask_id, self._size, self._seed = fraction, mask_id, micro_batch_size, seed

    def gradients(self, rows: Sequence[int], step: int) -> float:
        """Add the gradients of one batch to the adapters; returns its loss."""
        masked = [mask(self._rows[row], self._fraction, self._mask_id, (self._seed, step, row)) for row in rows]
        hidden_tokens = sum(len(row.positions) for row in masked)
        total = 0.0
        for part, chosen in enumerate(parts(range(len(masked)), self._size)):
            with self.noise.drawing(self._seed, step, part):
                loss = self.loss_sum([masked[at] for at in chosen]) / hidden_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def loss_sum(self, masked: Sequence[Masked]) -> "torch.Tensor":
        """Sum of the cross-entropy over the hidden tokens of some rows, a scalar."""
        import torch

        from pipeline.backbone.output_head import linear_cross_entropy

        device = self.body.device
        ids, attended = (tensor.to(device) for tensor in pad_left([row.ids for row in masked]))
        states = hidden_states(self.body, ids, attended).flatten(0, 1)
        labels = torch.tensor([label for row in masked for label in row.labels], device=device)
        at = torch.tensor(predicting(masked), device=device)
        return linear_cross_entropy(
            states.index_select(0, at), self._head.weight, labels, bias=self._head.bias, transform=self._shape
        )
