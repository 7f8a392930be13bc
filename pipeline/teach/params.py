"""Section `teach` of params.yaml.

Steps, batch sizes, token limits, learning rates, mask fraction, dropout, scale and LoRA's rank and alpha default to the
LLM2Vec paper's and its published settings. Not the paper's: the constant rate, that each masked token becomes the mask
token, and that a row is one text (docs/teachers.md).
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.backbone.loading import DType
from pipeline.backbone.lora import LoraParams
from pipeline.core.bootstrap import BootstrapParams
from pipeline.core.config import SEEDS, Params
from pipeline.core.readers import Source
from pipeline.optim.schedule import ScheduleKind

Corpus = Literal["responses", "queries", "both", "sources"]
PhaseName = Literal["mntp", "simcse"]


class TeacherLoraParams(LoraParams):
    """Keys `teach.mntp.lora` and `teach.simcse.lora`."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.05, ge=0, lt=1)


class PhaseParams(Params):
    """Keys of both phases, with the defaults of MNTP."""

    steps: int = Field(default=1000, ge=1, description="optimiser steps")
    batch_size: int = Field(default=32, ge=1, description="texts of one optimiser step")
    micro_batch_size: int = Field(default=8, ge=1, description="texts of one forward pass")
    max_tokens: int = Field(default=512, ge=2, description="longer texts lose their end")
    learning_rate: float = Field(default=5e-5, gt=0)
    lora: TeacherLoraParams = Field(default_factory=TeacherLoraParams)


class MntpParams(PhaseParams):
    """Masked next-token prediction."""

    mask_fraction: float = Field(default=0.2, gt=0, lt=1, description="of a text's own tokens")
    mask_token: str = Field(default="_", min_length=1, description="one token of the backbone's tokenizer")


class SimcseParams(PhaseParams):
    """Unsupervised SimCSE."""

    batch_size: int = Field(default=128, ge=2, description="texts of one optimiser step, each other's negatives")
    micro_batch_size: int = Field(
        default=32, ge=1, description="texts of one forward pass; fewer than batch_size: every pass is run twice"
    )
    max_tokens: int = Field(default=128, ge=2, description="longer texts lose their end")
    learning_rate: float = Field(default=3e-5, gt=0)
    dropout: float = Field(default=0.3, ge=0, lt=1, description="what the two readings of a text differ in")
    scale: float = Field(default=20.0, gt=0, description="of the cosines: one over the temperature")


class QualityParams(Params):
    """Tasks and texts that the teacher is measured on; no tasks by default."""

    local: list[str] = Field(default_factory=list, description="folders under evaluate.local_dir")
    tasks: list[str] = Field(default_factory=list, description="mteb task names")
    texts: int = Field(default=512, ge=4, description="of the corpus, at most, for what needs no labels")
    bootstrap: BootstrapParams = Field(default_factory=BootstrapParams)


class TeachParams(Params):
    """Section `teach`; read if the teacher is trained here."""

    corpus: Corpus = Field(default="both", description="unlabeled text: of this run, or of `sources`")
    sources: list[Source] = Field(default_factory=list, description="as in collect; paths start at collect.local_dir")
    mntp: MntpParams = Field(default_factory=MntpParams)
    simcse: SimcseParams = Field(default_factory=SimcseParams)
    # The published runs decay over epochs of their corpus and stop at 1,000 steps: their rate hardly falls.
    schedule: ScheduleKind = Field(default="constant", description="of the learning rate; linear and cosine end at 0")
    warmup_steps: int = Field(default=0, ge=0, description="of each phase")
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    dtype: DType = Field(default="bfloat16", description="of the frozen backbone; the adapters are float32")
    checkpoint_every: int = Field(default=100, ge=1, description="optimiser steps")
    quality: QualityParams = Field(default_factory=QualityParams)
    on_worse: Literal["warn", "fail"] = Field(
        default="warn", description="where the trained teacher scores below an untrained reading of the backbone"
    )
    seed: int = Field(default=0, ge=0, lt=SEEDS)

    @model_validator(mode="after")
    def _sources_are_read(self) -> Self:
        if (self.corpus == "sources") != bool(self.sources):
            raise ValueError(f"corpus {self.corpus} with {len(self.sources)} sources: they go together")
        for number, source in enumerate(self.sources):
            if source.instruction:
                raise ValueError(f"sources.{number}.instruction: a teacher learns from bare texts, leave it out")
        return self

    def phase(self, name: PhaseName) -> PhaseParams:
        """The section of a phase."""
        return self.mntp if name == "mntp" else self.simcse

    def step_params(self, phase: PhaseName) -> dict[str, Any]:
        """Params that change the training trajectory of a phase; a checkpoint is resumed only if they are equal."""
        shared = {"schedule", "warmup_steps", "weight_decay", "max_grad_norm", "dtype", "seed"}
        return self.model_dump(mode="json", include={phase, *shared})
