"""Texts to vectors with a language model's body: batches of like lengths, left padding, pooled hidden states."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.backbone.prompting import pad_left
from pipeline.core.errors import TeacherError
from pipeline.core.text import by_length
from pipeline.embed.teachers.template import TemplateTokenizer, Tokens
from pipeline.optim.batching import CHARACTERS_PER_TOKEN, token_batches, token_budget
from pipeline.parallel.prefetch import ahead

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


# Batches whose texts are tokenised and sorted together.
WINDOW_BATCHES = 4
WINDOW_TEXTS = 4096


class PaddedTexts(NamedTuple):
    """Left-padded texts: ids, attention mask, and which tokens are pooled; int64 `[B, T]` each."""

    ids: "torch.Tensor"
    mask: "torch.Tensor"
    pooled: "torch.Tensor"


class PooledTeacher:
    """A `Teacher`: the mean of the last (final-normed) hidden states over the tokens that the tokenizer marks.

    A batch holds texts of similar length, so little is computed for padding; the longest come first, so that a batch
    that is too large for memory fails at once. While a batch is read, a thread tokenises and pads the next.
    """

    def __init__(
        self,
        body: "PreTrainedModel",
        tokenizer: TemplateTokenizer,
        *,
        identity: dict[str, Any],
        batch_tokens: int | None = None,
    ) -> None:
        """Take a transformer without its head, in eval mode; it stays on its device.

        `batch_tokens` is the most tokens of a forward pass, padding included, unless one text alone has more; None: by
        the device.
        """
        self.body, self.identity = body, identity
        self.token_lengths = tokenizer.lengths
        self.max_tokens: int | None = tokenizer.max_tokens
        self._tokenizer, self._batch_tokens = tokenizer, token_budget(batch_tokens, body.device.type)
        self.width = int(body.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Teacher.embed`. A text without tokens embeds as the EOS token."""
        import torch

        vectors = np.empty((len(texts), self.width), np.float32)
        with torch.inference_mode():
            for rows, batch in ahead(self._batches(texts)):
                vectors[rows] = pooled_mean(self.body, batch).cpu().numpy()
        return vectors

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], PaddedTexts]]:
        for window in windows(texts, self._batch_tokens):
            tokens = self._tokenizer([texts[row] for row in window])
            for batch in token_batches([len(each.ids) for each in tokens], self._batch_tokens, padded=True):
                yield [window[at] for at in batch], padded([tokens[at] for at in batch])


def windows(texts: Sequence[str], batch_tokens: int) -> list[list[int]]:
    """Rows of texts that are tokenised together, the longest first: about `WINDOW_BATCHES` batches each."""
    return by_length(texts, WINDOW_TEXTS, WINDOW_BATCHES * batch_tokens * CHARACTERS_PER_TOKEN)


def padded(rows: Sequence[Tokens]) -> PaddedTexts:
    """Tokens of texts as one batch, padded on the left."""
    ids, mask = pad_left([row.ids for row in rows])
    return PaddedTexts(ids, mask, pad_left([row.pooled for row in rows])[0])


def pooled_states(body: Any, rows: Sequence[Tokens]) -> "torch.Tensor":
    """The mean over the pooled tokens of each row, float32 `[B, d]` on the body's device; differentiable."""
    return pooled_mean(body, padded(rows))


def pooled_mean(body: Any, texts: PaddedTexts) -> "torch.Tensor":
    """As `pooled_states`, of padded texts on any device."""
    import torch

    ids, mask, pooled = (tensor.to(body.device) for tensor in texts)
    pooled = pooled.unsqueeze(-1)
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
