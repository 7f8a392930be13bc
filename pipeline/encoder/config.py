"""What is written down beside the trained tensors."""

from typing import Any

from pipeline.backbone import Template
from pipeline.encoder.lora import LoraParams
from pipeline.params import Params


class EncoderConfig(Params):
    """Everything that loading needs besides the tensors; `encoder_config.json` of the model folder."""

    backbone: dict[str, str]
    chat_template_kwargs: dict[str, Any]
    template: Template
    max_query_tokens: int
    compression_tokens: int
    thought_tokens: int
    hidden: int
    width: int
    teacher: dict[str, Any]
    lora: LoraParams | None = None
    origin: dict[str, str] | None = None
