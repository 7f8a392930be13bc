"""The config of an encoder folder, and the names of the folder's files."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from pipeline.backbone.loading import Keep, Pool, Template
from pipeline.backbone.lora import LoraParams
from pipeline.core.config import Params
from pipeline.core.errors import TrainingError

log = logging.getLogger(__name__)

CONFIG_FILE = "encoder_config.json"
WEIGHTS_FILE = "student.safetensors"
READING_FILE = "reading.safetensors"
ROTATION_FILE = "rotation.safetensors"
START_FILE = "start.safetensors"
ADAPTER = "adapter"

ResponseForm = Literal["beside", "added"]


class EncoderConfig(Params):
    """Everything that loading needs besides the tensors; `encoder_config.json` of the folder."""

    backbone: dict[str, str]
    chat_template_kwargs: dict[str, Any]
    template: Template
    max_query_tokens: int
    keep: Keep = "start"
    pool: Pool = "tokens"
    compression_tokens: int
    thought_tokens: int
    hidden: int
    width: int
    teacher: dict[str, Any]
    transform: dict[str, str] | None = None
    response_share: float = Field(default=1.0, gt=0, le=1, description="of the embedding; the rest is the reading")
    response_form: ResponseForm = Field(default="beside", description="how a share below 1 and the reading are joined")
    decorrelate_reading: bool = Field(default=False, description="the reading's map decorrelates it, in either form")
    rotated_width: int | None = Field(
        default=None, ge=1, description="dimensions of rotated embeddings; null = as made"
    )
    lora: LoraParams | None = None
    origin: dict[str, str] | None = None

    @property
    def embedding_width(self) -> int:
        """Dimensions of an embedding; `width` are those of the predicted response."""
        made = embedding_width(self.response_share, self.width, self.hidden, self.response_form)
        return self.rotated_width or made

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
    apart = {"teacher", "origin", "transform"}
    # Left out where they change nothing, so that what earlier versions embedded is found.
    usual = {"response_share": 1, "pool": "tokens", "rotated_width": None}
    apart |= {name for name, value in usual.items() if getattr(config, name) == value}
    beside = config.response_form == "beside"
    apart |= {"response_form"} if config.response_share == 1 or beside else set()
    apart |= set() if config.response_share < 1 and beside and config.decorrelate_reading else {"decorrelate_reading"}
    return {**identity, "config": config.model_dump(exclude=apart)}


def embedding_width(share: float, width: int, hidden: int, form: ResponseForm = "beside") -> int:
    """Dimensions of an embedding at a response share, unrotated, of predictions `width` and hidden states `hidden`."""
    return width if form == "added" and 0 < share < 1 else width * (share > 0) + hidden * (share < 1)


def in_reading_space(teacher: Mapping[str, Any], transform: Mapping[str, str] | None) -> bool:
    """Whether targets of this teacher are a standardised reading of the backbone, so that readings have their space."""
    mean = teacher.get("kind") == "backbone" and teacher.get("pooling") == "mean"
    return mean and transform is not None and transform.get("kind") == "standardize"


def check_decorrelated(
    form: ResponseForm,
    teacher: Mapping[str, Any],
    transform: Mapping[str, str] | None,
    *,
    decorrelated: bool,
    mapped: bool,
) -> None:
    """Raises TrainingError if a reading cannot be decorrelated, which `added` must be as the targets are.

    `decorrelated`: the transform takes correlation away; `mapped`: see `check_form`.
    """
    if mapped:
        raise TrainingError(
            "true: with embed.queries: true the reading is mapped to the teacher's space already: set one of them",
            argument="decorrelate_reading",
        )
    if form == "added" and not (decorrelated and in_reading_space(teacher, transform)):
        raise TrainingError(
            "true: the targets that it is added to must be a decorrelated reading of the backbone itself "
            "(embed.teacher.kind: backbone, its mean, and embed.transform: {kind: standardize, decorrelate: 0.5}): set "
            "that, or take the form beside",
            argument="decorrelate_reading",
        )


def check_form(
    form: ResponseForm, teacher: Mapping[str, Any], transform: Mapping[str, str] | None, *, mapped: bool
) -> None:
    """Raises TrainingError if a prediction in the space of these targets cannot be added to a standardised reading.

    `mapped`: the reading has a map to that space, since the teacher embedded the queries too.
    """
    if form == "added" and not (mapped or in_reading_space(teacher, transform)):
        raise TrainingError(
            "added: the teacher must embed the queries too (embed.queries: true and train.decorrelate_reading: false, "
            "then train), or the targets be a reading of the backbone itself, its mean hidden states standardised "
            "(embed.teacher.kind: backbone, embed.transform.kind: standardize): set that, or take the form beside",
            argument="response_form",
        )
