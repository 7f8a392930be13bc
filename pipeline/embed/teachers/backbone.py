"""The frozen backbone itself as a teacher: pooling of its last hidden states, causal attention."""

import logging

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams, DType, identify, load_backbone, load_tokenizer
from pipeline.backbone.prompting import SLOT
from pipeline.embed.teachers.pooling import PooledTeacher, check_positions
from pipeline.embed.teachers.template import Pooling, TemplateTokenizer

log = logging.getLogger(__name__)

VERSION = 1


def load_backbone_teacher(
    backbone: BackboneParams,
    *,
    max_tokens: int,
    dtype: DType,
    batch_tokens: int | None = None,
    template: str = SLOT,
    pooling: Pooling = "mean",
) -> PooledTeacher:
    """Load the backbone onto the best device.

    Special tokens are read but not pooled: the first position of a language model is an attention sink whose norm
    would drown the text. With an echo template the text is read twice and only its second reading is pooled.

    Raises:
        BackboneError: the backbone cannot be loaded.
        TeacherError: `max_tokens` exceeds its positions, or the template leaves no room for a text.
    """
    device = best_device()
    log.info("teacher backbone: device %s (the best present), %s", device, dtype)
    body = load_backbone(backbone.model_copy(update={"dtype": dtype}), device).get_decoder()
    check_positions(body.config, max_tokens)
    tokenizer = TemplateTokenizer(load_tokenizer(backbone), max_tokens=max_tokens, template=template, pooling=pooling)
    identity = {
        **identify(backbone.name, backbone.revision),
        "kind": "backbone",
        "version": VERSION,
        **tokenizer.identity,
        "dtype": dtype,
    }
    return PooledTeacher(body, tokenizer, batch_tokens=batch_tokens, identity=identity)
