"""Texts to vectors with a language model's body: batches of like lengths, left padding, pooled hidden states."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.backbone.prompting import pad_left
from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.template import TemplateTokenizer, Tokens

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


class PooledTeacher:
    """A `Teacher`: the mean of the last (final-normed) hidden states over the tokens that the tokenizer marks.

    A batch holds texts of similar length, so little is computed for padding; the longest come first, so that a batch
    that is too large for memory fails at once.
    """

    def __init__(
        self, body: "PreTrainedModel", tokenizer: TemplateTokenizer, *, batch_size: int, identity: dict[str, Any]
    ) -> None:
        """Take a transformer without its head, in eval mode; it stays on its device."""
        self.body, self.identity = body, identity
        self.token_lengths = tokenizer.lengths
        self.max_tokens: int | None = tokenizer.max_tokens
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self.width = int(body.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Teacher.embed`. A text without tokens embeds as the EOS token."""
        import torch

        rows = self._tokenizer(texts)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids), reverse=True)
        vectors = np.empty((len(rows), self.width), np.float32)
        with torch.inference_mode():
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                vectors[batch] = pooled_states(self.body, [rows[index] for index in batch]).cpu().numpy()
        return vectors


def pooled_states(body: Any, rows: Sequence[Tokens]) -> "torch.Tensor":
    """The mean over the pooled tokens of each row, float32 `[B, d]` on the body's device; differentiable."""
    import torch

    ids, mask = (tensor.to(body.device) for tensor in pad_left([row.ids for row in rows]))
    pooled = pad_left([row.pooled for row in rows])[0].to(body.device).unsqueeze(-1)
    hidden = hidden_states(body, ids, mask).float()
    # Not a product: a padded position may hold NaN, whose gradient would be NaN too.
    return torch.where(pooled.bool(), hidden, 0.0).sum(1) / pooled.sum(1)


def hidden_states(body: Any, ids: Any, mask: Any) -> Any:
    """Last hidden states `[B, T, d]` of left-padded rows: `ids` and `mask` are int64 `[B, T]` on the body's device."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


def check_positions(config: "PretrainedConfig", max_tokens: int) -> None:
    """Raises TeacherError if `max_tokens` exceeds the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise TeacherError(f"{max_tokens} exceeds the model's {positions} positions", argument="max_tokens")
