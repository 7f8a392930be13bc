"""The frozen backbone itself as a teacher: pooling of its last hidden states, causal attention."""

import logging
from typing import TYPE_CHECKING, Any

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams, identify, load_backbone, load_tokenizer
from pipeline.embed.teachers.pooling import PooledTeacher, TextPooler, check_positions
from pipeline.embed.teachers.template import SLOT, Pooling, Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

VERSION = 1


class BackboneTeacher(PooledTeacher):
    """Mean over a text's own tokens of the last (final-normed) hidden states, or its last token's.

    Special tokens are read but not pooled: the first position of a language model is an attention sink whose norm
    would drown the text. With an echo template the text is read twice and only its second reading pooled.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_tokens: int,
        batch_size: int,
        identity: dict[str, Any],
        template: str = SLOT,
        pooling: Pooling = "mean",
    ) -> None:
        """Take a loaded model as it is, on the device it is on.

        Args:
            model: a causal LM in eval mode.
            tokenizer: its tokenizer.
            max_tokens: longer texts lose their end.
            batch_size: texts of one forward pass.
            identity: what pins the embeddings.
            template: what is read, see `reading`.
            pooling: which of its tokens are pooled, see `reading`.

        Raises:
            TeacherError: the template leaves no room for a text.
        """
        reader = Reader(tokenizer, max_tokens=max_tokens, template=template, pooling=pooling)
        super().__init__(TextPooler(model.get_decoder(), reader, batch_size=batch_size), identity)

    @classmethod
    def load(
        cls,
        backbone: BackboneParams,
        *,
        max_tokens: int,
        batch_size: int,
        template: str = SLOT,
        pooling: Pooling = "mean",
    ) -> "BackboneTeacher":
        """Load the backbone onto the best device.

        Raises:
            BackboneError: it cannot be loaded.
            TeacherError: `max_tokens` exceeds its positions, or the template leaves no room for a text.
        """
        device = best_device()
        log.info("teacher backbone: device %s (the best present), %s", device, backbone.dtype)
        model = load_backbone(backbone, device)
        check_positions(model.get_decoder().config, max_tokens, "backbone")
        identity = {
            **identify(backbone.name, backbone.revision),
            "kind": "backbone",
            "version": VERSION,
            "template": template,
            "pooling": pooling,
            "max_tokens": max_tokens,
            "dtype": backbone.dtype,
        }
        return cls(
            model,
            load_tokenizer(backbone),
            max_tokens=max_tokens,
            batch_size=batch_size,
            identity=identity,
            template=template,
            pooling=pooling,
        )
