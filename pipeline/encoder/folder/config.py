"""The config of an encoder folder, and the names of the folder's files."""

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from pipeline.backbone.loading import Keep, Template
from pipeline.backbone.lora import LoraParams
from pipeline.core.config import Params

log = logging.getLogger(__name__)

CONFIG_FILE = "encoder_config.json"
WEIGHTS_FILE = "student.safetensors"
READING_FILE = "reading.safetensors"
ROTATION_FILE = "rotation.safetensors"
START_FILE = "start.safetensors"
ADAPTER = "adapter"


class EncoderConfig(Params):
    """Everything that loading needs besides the tensors; `encoder_config.json` of the folder."""

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
    response_share: float = Field(default=1.0, gt=0, le=1, description="of the embedding; the rest is the reading")
    rotated_width: int | None = Field(
        default=None, ge=1, description="dimensions of rotated embeddings; null = as made"
    )
    lora: LoraParams | None = None
    origin: dict[str, str] | None = None

    @property
    def embedding_width(self) -> int:
        """Dimensions of an embedding; `width` are those of the predicted response."""
        return self.rotated_width or embedding_width(self.response_share, self.width, self.hidden)

    @property
    def ordered(self) -> bool:
        """Whether the first dimensions of an embedding hold most of it."""
        # The targets' own rotation does not reach the reading beside the prediction.
        by_targets = self.response_share == 1 and self.transform is not None and "rotate" in self.transform["kind"]
        return self.rotated_width is not None or by_targets

    def truncation_note(self, count: int, total: int) -> str:
        """A sentence about `count` of `total` texts that were too long."""
        lost = "end" if self.keep == "start" else "start"
        return (
            f"{count} of {total} texts are longer than {self.max_query_tokens} tokens, prompt and template included "
            f"(max_query_tokens), and lose their {lost} (keep: {self.keep})"
        )

    def warn_of_truncated(self, count: int, total: int) -> None:
        if count:
            log.warning("%s", self.truncation_note(count, total))


def fingerprint(identity: Mapping[str, Any], config: EncoderConfig) -> dict[str, Any]:
    """What an embedding depends on besides its text: the weights (`identity`) and how a prompt is made of the text."""
    apart = {"teacher", "origin", "transform"} | ({"response_share"} if config.response_share == 1 else set())
    apart |= {"rotated_width"} if config.rotated_width is None else set()
    return {**identity, "config": config.model_dump(exclude=apart)}


def embedding_width(share: float, width: int, hidden: int) -> int:
    """Dimensions of an embedding at a response share, unrotated, of predictions `width` and hidden states `hidden`."""
    return width * (share > 0) + hidden * (share < 1)
