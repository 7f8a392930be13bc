"""Texts to vectors with the body of a language model: batches sorted by length, left padding, pooled hidden states."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.backbone.prompting import pad_left
from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.template import Reader, Tokens

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


class TextPooler:
    """The mean of the last (final-normed) hidden states over the tokens that the reader marks.

    A batch holds texts of like length, so next to nothing is computed for padding; the longest come first, so that too
    large a batch shows at once.
    """

    def __init__(self, body: "PreTrainedModel", reader: Reader, *, batch_size: int) -> None:
        """`body` is a transformer without its head, in eval mode; it stays on its device."""
        self.body, self.reader, self._batch_size = body, reader, batch_size
        self.width = int(body.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """See `Teacher.embed`."""
        import numpy as np

        rows = self.reader(texts)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids), reverse=True)
        vectors = np.empty((len(rows), self.width), np.float32)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            vectors[chosen] = self._forward([rows[index] for index in chosen])
        return vectors

    def _forward(self, rows: Sequence[Tokens]) -> "np.ndarray[Any, Any]":
        """Embeddings float32 [B, d] of one batch."""
        import torch

        with torch.inference_mode():
            return pooled_states(self.body, rows).cpu().numpy()


def pooled_states(body: Any, rows: Sequence[Tokens]) -> "torch.Tensor":
    """The mean over the pooled tokens of each row, float32 `[B, d]` on the body's device; a gradient flows."""
    import torch

    ids, mask = (tensor.to(body.device) for tensor in pad_left([row.ids for row in rows]))
    pooled = pad_left([row.pooled for row in rows])[0].to(body.device).unsqueeze(-1)
    hidden = hidden_states(body, ids, mask).float()
    # Not a product: a padded position may hold NaN, whose gradient would be NaN too.
    return torch.where(pooled.bool(), hidden, 0.0).sum(1) / pooled.sum(1)


def hidden_states(body: Any, ids: Any, mask: Any) -> Any:
    """Last hidden states [B, T, d] of left-padded rows: `ids` and `mask` are int64 [B, T] on the body's device."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


def check_positions(
    config: "PretrainedConfig", max_tokens: int, model: str, *, key: str = "embed.teacher.max_tokens"
) -> None:
    """Raises TeacherError if `max_tokens` (of this key) exceeds the positions of the model (named in the message)."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_tokens > positions:
        raise TeacherError(f"{key} ({max_tokens}) exceeds the {model}'s {positions} positions")


class PooledTeacher:
    """What the teachers that pool a language model's hidden states share; see `Teacher` for the methods."""

    def __init__(self, pooler: TextPooler, identity: dict[str, Any]) -> None:
        """`identity` pins the embeddings."""
        self._pooler, self.width, self.identity = pooler, pooler.width, identity

    def embed(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """See `Teacher.embed`. A text without tokens embeds as the EOS token."""
        return self._pooler.embed(texts)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """See `Teacher.token_counts`."""
        return self._pooler.reader.token_counts(texts)

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """See `Teacher.truncated`."""
        return self._pooler.reader.truncated(texts)
