"""Masked next-token prediction: a masked token is predicted from the position before it, with bidirectional attention.

The model keeps predicting the next token while it learns to use later ones. Only masked positions get logits: a fifth
of a text's tokens, a few at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.backbone.prompting import pad_left
from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.pooling import hidden_states
from pipeline.embed.teachers.template import Tokens
from pipeline.optim.batching import parts
from pipeline.teach.dropout import SeededDropout

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from pipeline.backbone.output_head import LogitTransform


def mask_token_id(tokenizer: "PreTrainedTokenizerBase", mask_token: str) -> int:
    """The id of the mask token; raises TeacherError if the vocabulary lacks it, or the tokenizer splits it."""
    found = tokenizer.get_vocab().get(mask_token)
    ids = [found] if found is not None else tokenizer(mask_token, add_special_tokens=False)["input_ids"]
    unknown = ids == [tokenizer.unk_token_id] and mask_token != tokenizer.unk_token
    if len(ids) != 1 or unknown:
        what = "an unknown token" if unknown else f"{len(ids)} tokens"
        raise TeacherError(
            f"{mask_token!r} is {what} of the tokenizer of '{tokenizer.name_or_path}', must be one: choose another, "
            "e.g. '_'",
            argument="mask_token",
        )
    return int(ids[0])


def maskable(row: Tokens) -> list[int]:
    """Positions that may be masked: the text's own tokens, but not the first, which nothing predicts."""
    return [at for at in range(1, len(row.ids)) if row.pooled[at]]


class MaskedRow(NamedTuple):
    """A row's ids with mask tokens, their positions (ascending), and the original tokens there."""

    ids: list[int]
    positions: list[int]
    labels: list[int]


def mask_row(row: Tokens, fraction: float, mask_id: int, seed: Sequence[int]) -> MaskedRow:
    """Mask this fraction of the maskable tokens, at least one, drawn from the seed."""
    candidates = maskable(row)
    count = max(1, round(fraction * len(candidates)))
    chosen = sorted(np.random.default_rng(list(seed)).choice(candidates, count, replace=False).tolist())
    ids = list(row.ids)
    for at in chosen:
        ids[at] = mask_id
    return MaskedRow(ids, chosen, [row.ids[at] for at in chosen])


def predicting_positions(rows: Sequence[MaskedRow]) -> list[int]:
    """For each masked token of left-padded rows, the flat position that predicts it: one before its own."""
    width = max(len(row.ids) for row in rows)
    return [index * width + (width - len(row.ids)) + at - 1 for index, row in enumerate(rows) for at in row.positions]


@dataclass
class MntpObjective:
    """Gradients of the mean cross-entropy over the masked tokens of a batch.

    Attributes:
        body: bidirectional, with the trained adapters.
        rows: all texts; each has a maskable token.
        head: the frozen output head, a linear layer; `transform` is of its logits.
        fraction: of the maskable tokens that become `mask_id`.
        micro_batch_size: rows of a forward pass.
        seed: of masks and dropout.
    """

    body: Any
    dropout: SeededDropout
    rows: Sequence[Tokens]
    head: Any
    transform: "LogitTransform"
    fraction: float
    mask_id: int
    micro_batch_size: int
    seed: int

    def gradients(self, rows: Sequence[int], step: int) -> float:
        """See `Objective`."""
        masked = [mask_row(self.rows[row], self.fraction, self.mask_id, (self.seed, step, row)) for row in rows]
        masked_tokens = sum(len(row.positions) for row in masked)
        total = 0.0
        for part, chosen in enumerate(parts(range(len(masked)), self.micro_batch_size)):
            with self.dropout.enabled(self.seed, step, part):
                loss = self.loss_sum([masked[at] for at in chosen]) / masked_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def loss_sum(self, masked: Sequence[MaskedRow]) -> "torch.Tensor":
        """Sum of the cross-entropy over the masked tokens of some rows, a scalar."""
        import torch

        from pipeline.backbone.output_head import linear_cross_entropy

        device = self.body.device
        ids, attended = (tensor.to(device) for tensor in pad_left([row.ids for row in masked]))
        states = hidden_states(self.body, ids, attended).flatten(0, 1)
        labels = torch.tensor([label for row in masked for label in row.labels], device=device)
        at = torch.tensor(predicting_positions(masked), device=device)
        return linear_cross_entropy(
            states.index_select(0, at), self.head.weight, labels, bias=self.head.bias, transform=self.transform
        )
