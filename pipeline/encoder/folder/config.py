"""What is written down beside the trained tensors."""

from collections.abc import Mapping
from typing import Any

from pipeline.backbone.loading import Keep, Template
from pipeline.backbone.lora import LoraParams
from pipeline.core.config import Params


class EncoderConfig(Params):
    """Everything that loading needs besides the tensors; `encoder_config.json` of the model folder."""

    backbone: dict[str, str]
    chat_template_kwargs: dict[str, Any]
    template: Template
    max_query_tokens: int
    keep: Keep = "start"
    compression_tokens: int
    thought_tokens: int
    hidden: int
    width: int
    teacher: dict[str, Any]
    transform: dict[str, str] | None = None
    lora: LoraParams | None = None
    origin: dict[str, str] | None = None

    def cut(self, count: int, total: int) -> str:
        """What has become of `count` of `total` texts that were too long."""
        lost = "end" if self.keep == "start" else "start"
        return (
            f"{count} of {total} texts are longer than {self.max_query_tokens} tokens, prompt and template included "
            f"(train.max_query_tokens), and lose their {lost} (train.too_long: keep_{self.keep})"
        )


def fingerprint(identity: Mapping[str, Any], config: EncoderConfig) -> dict[str, Any]:
    """What decides an embedding besides its text: an encoder's weights (`identity`), and how texts become prompts."""
    return {**identity, "config": config.model_dump(exclude={"teacher", "origin", "transform"})}
