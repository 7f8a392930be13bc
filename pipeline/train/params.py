"""Section `train` of params.yaml."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.backbone.loading import Keep, Pool, Quantize, Template
from pipeline.backbone.lora import LoraParams
from pipeline.backbone.prompting import check_instructions_stay, first_instruction
from pipeline.core.config import SEEDS, Params
from pipeline.core.errors import TrainingError
from pipeline.core.tracking import Tracker
from pipeline.encoder.folder.config import ResponseForm
from pipeline.encoder.token_init import TokenInitParams
from pipeline.parallel.devices import Count

Score = Literal["cosine", "top1", "mrr", "recon"]

# Params that change rounding, speed or memory only.
_NUMERIC = {
    "checkpoint_every",
    "processes",
    "shard_backbone",
    "passes",
    "micro_batch_size",
    "max_tokens_per_batch",
}
# Params of what is made of the trained student.
_AFTER = {"refit_alignment", "response_share", "response_form"}
# Params that change no step already taken, if the schedule does not end with the run.
_LENGTH = {"epochs", "stop_after_steps"}


class PassParams(Params):
    """How batches run through the frozen backbone. All settings give the same loss and gradients up to rounding."""

    packed: bool = Field(default=True, description="variable-length rows side by side, no padding")
    frozen_prefix: bool = Field(default=True, description="the query runs without autograd, the new tokens against it")
    fused_cross_entropy: bool = Field(default=True, description="logits for a few positions at a time only")
    checkpoint_responses: bool = Field(default=False, description="less memory, slower: recompute in the backward pass")
    recompute_gates: float = Field(
        default=0.65,
        ge=0,
        le=1,
        description="on a GPU: share of the layers whose feed-forward network runs again in the backward pass",
    )
    attention: Literal["auto", "segments", "varlen", "flex"] = "auto"


class WarmStartParams(Params):
    """The closed-form start of the projections; disabled: the paper's random start."""

    enabled: bool = False
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    rows: int | None = Field(default=20_000, ge=2, description="at most this many training rows; null = all")


class RefineParams(Params):
    """Contrastive refinement of the closed form, see `pipeline.train.refine`."""

    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=1024, ge=2, description="rows whose targets are each other's negatives")
    temperature: float = Field(default=0.07, gt=0)
    learning_rate: float = Field(default=0.03, gt=0, description="of AdamW, in units of the weights' root mean square")
    pull: float = Field(default=1.0, ge=0, description="towards the closed form")
    duplicate: float = Field(default=0.9, gt=0, le=1, description="cosine of targets from which rows are no negatives")


class HeldoutParams(Params):
    """Scores of held-out rows during training."""

    every: int | None = Field(default=None, ge=1, description="optimiser steps; null = before the first and at the end")
    rows: int = Field(default=256, ge=2, description="at most this many held-out rows")
    select: Score | None = Field(default=None, description="keep the student that scored best; null = the last one")


class TrainParams(Params):
    """Section `train`."""

    compression_tokens: int = Field(ge=1)
    thought_tokens: int = Field(ge=0)
    token_start: TokenInitParams = Field(default_factory=TokenInitParams)
    lora: LoraParams | None = None
    template: Template
    pool: Pool = Field(
        default="tokens",
        description="what an embedding is made of: the mean over the compression tokens, over the second text of "
        "template echo, or over both",
    )
    max_query_tokens: int = Field(ge=1)
    too_long: Literal["keep_start", "keep_end"] = Field(
        default="keep_start", description="of a query, or later a text, that is longer; as in generate"
    )
    max_response_tokens: int = Field(ge=1)
    long_responses: Literal["error", "cut"] = "error"
    drop_loops: bool = Field(default=False, description="leave out answers that end in a repetition loop")
    passes: PassParams = Field(default_factory=PassParams)
    quantize: Quantize | None = Field(default=None, description="of the frozen backbone")
    align_weight: float = Field(ge=0)
    recon_weight: float = Field(ge=0)
    align_reduction: Literal["mean", "sum"]
    warm_start: WarmStartParams
    refine: RefineParams | None = Field(default=None, description="of the closed form, by contrast; null = none")
    learning_rate: float = Field(gt=0)
    token_learning_rate: float | None = Field(default=None, gt=0, description="of the token rows; null = learning_rate")
    weight_decay: float = Field(ge=0)
    schedule: Literal["linear", "cosine"] = "linear"
    warmup_steps: int = Field(ge=0)
    schedule_steps: int | None = Field(default=None, ge=1, description="where the rate reaches 0; null = last step")
    epochs: int = Field(ge=1)
    stop_after_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(ge=1, description="rows of one optimiser step, over all processes")
    micro_batch_size: Count = Field(
        default="auto", description="rows of one forward pass, fewer where they do not fit; auto: as many as fit"
    )
    max_tokens_per_batch: int | None = Field(
        default=None, ge=1, description="tokens of one forward pass, in place of micro_batch_size"
    )
    length_grouping: int | None = Field(
        default=None, ge=1, description="batches whose rows are sorted by length together; 1 = random; null = by passes"
    )
    max_grad_norm: float = Field(gt=0)
    heldout: HeldoutParams = Field(default_factory=HeldoutParams)
    response_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="of the embedding: 1 = the predicted response alone; below, the student's own reading beside it",
    )
    response_form: ResponseForm = Field(
        default="beside", description="of a share below 1: beside the reading, or added to it in the teacher's space"
    )
    decorrelate_reading: bool = Field(
        default=False,
        description="the reading loses half of its correlation; added, it is decorrelated as the targets are",
    )
    refit_alignment: bool = Field(
        default=False,
        description="after the last step the alignment is fitted again in closed form, over the trained tokens and "
        "reconstruction",
    )
    checkpoint_every: int = Field(ge=1, description="optimiser steps")
    track: Tracker | None = Field(default=None, exclude=True, description="losses and held-out scores, live")
    processes: Count = "auto"
    shard_backbone: bool = Field(default=False, description="FSDP2: each process holds a share of the backbone")
    seed: int = Field(ge=0, lt=SEEDS)

    @model_validator(mode="after")
    def _a_loss_is_left(self) -> Self:
        if not self.align_weight + self.recon_weight:
            raise ValueError("align_weight and recon_weight are both 0: no step would change anything")
        return self

    @model_validator(mode="after")
    def _sharding_is_of_plain_weights(self) -> Self:
        other = [name for name in ("lora", "quantize") if getattr(self, name)]
        if self.shard_backbone and other:
            raise ValueError(f"shard_backbone: true does not go with {' or '.join(other)}: set one of them")
        return self

    @model_validator(mode="after")
    def _sharded_passes_are_not_tried(self) -> Self:
        if self.shard_backbone and self.micro_batch_size == "auto" and self.max_tokens_per_batch is None:
            raise ValueError(
                "shard_backbone: true needs a number as micro_batch_size: a process that runs out of memory in a trial "
                "would leave the others waiting"
            )
        return self

    @model_validator(mode="after")
    def _refinement_has_a_start(self) -> Self:
        if self.refine and not self.warm_start.enabled:
            raise ValueError("refine needs the closed form: set warm_start.enabled to true, or refine to null")
        return self

    @model_validator(mode="after")
    def _pooled_texts_stand_twice(self) -> Self:
        if self.pool != "tokens" and self.template != "echo":
            raise ValueError(f"pool {self.pool} is of the second text: it needs template echo, not {self.template}")
        return self

    @property
    def keep(self) -> Keep:
        """The side of a too long text that is kept."""
        return "start" if self.too_long == "keep_start" else "end"

    @property
    def extra_tokens(self) -> int:
        """Tokens that a row adds to its query and response: the new tokens and the soft prompts."""
        return self.thought_tokens + 2 * self.compression_tokens

    def pass_rows(self, processes: int) -> int:
        """Rows that a forward pass may have: `micro_batch_size`, where that is auto a process's share of a step."""
        return -(-self.batch_size // processes) if self.micro_batch_size == "auto" else self.micro_batch_size

    def trajectory(self) -> dict[str, Any]:
        """Params that change the training trajectory. A checkpoint is resumed only if these are equal."""
        apart = _NUMERIC | _AFTER
        return self.model_dump(mode="json", exclude=apart | _LENGTH if self.schedule_steps else apart)


def planned_steps(rows: int, params: TrainParams) -> int:
    """Optimiser steps that the params ask for."""
    steps = math.ceil(rows / params.batch_size) * params.epochs
    return min(steps, params.stop_after_steps) if params.stop_after_steps else steps


def check_instructions(params: TrainParams, sources: Sequence[Mapping[str, Any]]) -> None:
    """Check that training leaves each instruction of `collect.sources`, as a manifest holds them, once and whole.

    Raises:
        TrainingError: the template would repeat one.
        BackboneError: one would be cut off a long query.
    """
    key = first_instruction(sources)
    if params.template == "echo" and key is not None:
        raise TrainingError(f"echo repeats {key}, which an evaluation writes once: take chat", argument="template")
    check_instructions_stay(params.too_long, sources)
