"""The frozen backbone itself as a teacher: mean pooling of its last hidden states."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.backbone import BackboneParams, best_device, identify, load_backbone, load_tokenizer, pad_left
from pipeline.errors import TeacherError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

VERSION = 1


class Tokens(NamedTuple):
    """Token ids of a text with the tokenizer's special tokens, and which of them belong to the text (1) or not (0)."""

    ids: list[int]
    pooled: list[int]


class BackboneTeacher:
    """Mean over a text's own tokens of the last (final-normed) hidden states; causal attention, no template.

    Special tokens are read but not pooled: the first position of a language model is an attention sink whose norm
    would drown the text.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_tokens: int,
        batch_size: int,
        identity: dict[str, Any],
    ) -> None:
        """Take a loaded model as it is, on the device it is on.

        Args:
            model: a causal LM in eval mode.
            tokenizer: its tokenizer.
            max_tokens: longer texts lose their end.
            batch_size: texts of one forward pass.
            identity: what pins the embeddings.
        """
        self._model, self._tokenizer = model, tokenizer
        self._max_tokens, self._batch_size = max_tokens, batch_size
        self.width = int(model.get_decoder().config.hidden_size)
        self.identity = identity

    @classmethod
    def load(cls, backbone: BackboneParams, *, max_tokens: int, batch_size: int) -> "BackboneTeacher":
        """Load the backbone onto the best device.

        Raises:
            BackboneError: it cannot be loaded.
            TeacherError: `max_tokens` exceeds its positions.
        """
        device = best_device()
        log.info("teacher backbone: device %s (the best present), %s", device, backbone.dtype)
        model = load_backbone(backbone, device)
        positions = getattr(model.get_decoder().config, "max_position_embeddings", None)
        if positions is not None and max_tokens > positions:
            raise TeacherError(f"embed.teacher.max_tokens ({max_tokens}) exceeds the backbone's {positions} positions")
        identity = {
            **identify(backbone.name, backbone.revision),
            "kind": "backbone",
            "version": VERSION,
            "pooling": "mean",
            "max_tokens": max_tokens,
            "dtype": backbone.dtype,
        }
        tokenizer = load_tokenizer(backbone)
        return cls(model, tokenizer, max_tokens=max_tokens, batch_size=batch_size, identity=identity)

    def embed(self, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
        """See `Teacher.embed`. A text without tokens embeds as the EOS token."""
        import numpy as np

        rows = [self._tokens(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        vectors = np.empty((len(rows), self.width), np.float32)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            vectors[chosen] = self._forward([rows[index] for index in chosen])
        return vectors

    def _tokens(self, text: str) -> Tokens:
        encoded = self._tokenizer(
            text, truncation=True, max_length=self._max_tokens, return_special_tokens_mask=True, verbose=False
        )
        ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        if all(special):
            return Tokens([*ids, self._tokenizer.eos_token_id or 0], [0] * len(ids) + [1])
        return Tokens(ids, [1 - flag for flag in special])

    def _forward(self, rows: Sequence[Tokens]) -> "np.ndarray[Any, Any]":
        """Embeddings float32 [B, d] of one batch."""
        import torch

        device = self._model.device
        ids, mask = (tensor.to(device) for tensor in pad_left([row.ids for row in rows]))
        pooled = pad_left([row.pooled for row in rows])[0].to(device).unsqueeze(-1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            hidden = self._model.get_decoder()(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state.float()
            # Not a product: a padded position may hold NaN.
            total = torch.where(pooled.bool(), hidden, 0.0).sum(1)
            return (total / pooled.sum(1)).cpu().numpy()
