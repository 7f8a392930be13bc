"""The section `evaluate`: which systems are compared, and how they embed texts."""

import re
from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.backbone.loading import DType
from pipeline.core.bootstrap import BootstrapParams
from pipeline.core.config import SEEDS, Params
from pipeline.embed.params import TargetType
from pipeline.encoder.storage import Precision, Storage
from pipeline.evaluate.registry import BUILT_IN
from pipeline.parallel.devices import Spread

# First parts of metric keys that name no system.
_TAKEN = ("delta", "reduction")
_PER_SEED = tuple(f"{name}-" for name, entry in BUILT_IN.items() if entry.per_seed)
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ModelParams(Params):
    """A sentence-transformers model to compare with."""

    name: str = Field(description="hub name or local folder")
    revision: str | None = Field(default=None, description="commit on the hub; pin it")
    max_tokens: int = Field(default=512, ge=1, description="longer texts lose their end; at most the model's own limit")
    dtype: DType = "float32"
    query_prompt: str | None = Field(default=None, description="null = the model's own, empty = none")
    document_prompt: str | None = Field(default=None, description="null = the model's own, empty = none")
    batch_size: int = Field(default=32, ge=1)
    trust_remote_code: bool = False


class AnswersParams(Params):
    """Overrides of section `generate` for the backbone's own answers, which `hyde` embeds and probes report."""

    max_new_tokens: int | None = Field(default=None, ge=1, description="null = generate.max_new_tokens")
    keep_engine: bool | None = Field(
        default=None, description="while the teacher embeds; null = only where the two do not share a GPU"
    )
    engine_memory: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="share of a GPU that a kept engine takes; the teacher has the rest",
    )


class StoredParams(Params):
    """A form in which the student's embeddings are stored; see `python -m pipeline encode`."""

    truncate_dim: int | None = Field(default=None, ge=1, description="the first dimensions; null = all")
    quantize: Precision | None = Field(default=None, description="int8 or binary; null = float32")

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.truncate_dim is None and self.quantize is None:
            raise ValueError("needs truncate_dim or quantize: the student itself is scored anyway")
        return self

    @property
    def storage(self) -> Storage:
        return Storage(self.truncate_dim, self.quantize)


class EvaluateParams(Params):
    """Which systems are compared, and how they embed texts."""

    models: dict[str, ModelParams] = Field(default_factory=dict, description="sentence-transformers models by system")
    systems: list[str] = Field(min_length=1, description="student is compared with the others")
    local_dir: str = Field(description="folder of the local task folders")
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens of one forward pass of a student, backbone-mean and echo; null = by the device",
    )
    data_parallel: Spread = Field(
        default="auto",
        description="processes that share the texts; auto: one a GPU; ray: on the cluster of $RAY_ADDRESS",
    )
    dtype: DType = "bfloat16"
    seeds: list[int] = Field(default=[0], min_length=1, description="of the untrained students' random starts")
    model_name: str | None = Field(
        default=None,
        pattern=r"^[^/\s]+/[^/\s]+$",
        description="organisation/name under which the student's mteb results are filed",
    )
    instructions: str | None = Field(default=None, description="YAML file of own instructions over the shipped ones")
    cache_embeddings: bool = Field(default=True, description="keep embeddings in the work folder")
    embeddings_dtype: TargetType = Field(
        default="float16", description="that embeddings are rounded to before they are scored and kept"
    )
    stored: list[StoredParams] = Field(
        default_factory=list, description="forms of the student's embeddings to score beside it, in a table of its own"
    )
    answers: AnswersParams = Field(default_factory=AnswersParams)
    bootstrap: BootstrapParams = Field(default_factory=BootstrapParams)

    @field_validator("models")
    @classmethod
    def _keys_name_systems(cls, models: dict[str, ModelParams]) -> dict[str, ModelParams]:
        for key in models:
            if key in BUILT_IN or key.startswith(_PER_SEED):
                raise ValueError(f"'{key}' is a built-in system: choose another key")
            if key in _TAKEN or not _KEY.fullmatch(key):
                raise ValueError(f"'{key}' cannot name a system: use letters, digits, . _ - (and not {_TAKEN})")
        return models

    @field_validator("systems")
    @classmethod
    def _systems_exist(cls, systems: list[str], info: ValidationInfo) -> list[str]:
        if "models" not in info.data:  # reported by its own validator
            return systems
        known = [*BUILT_IN, *info.data["models"]]
        if unknown := [name for name in systems if name not in known]:
            others = f"{', '.join(known)}; others are keys of evaluate.models"
            raise ValueError(f"there is no system {', '.join(unknown)} (there are: {others})")
        return systems

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        for name, values in (("systems", self.systems), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {values} contains a duplicate")
        if min(self.seeds) < 0 or max(self.seeds) >= SEEDS:
            raise ValueError(f"seeds {self.seeds} must be 0 or more, and below {SEEDS}")
        return self

    @model_validator(mode="after")
    def _stored_forms_of_the_student(self) -> Self:
        if len({form.storage for form in self.stored}) < len(self.stored):
            raise ValueError("stored contains a duplicate")
        if self.stored and "student" not in self.systems:
            raise ValueError(f"stored needs the student among the systems: they are {', '.join(self.systems)}")
        if self.stored and not self.cache_embeddings:
            raise ValueError("stored needs cache_embeddings: true, or every form would embed all texts again")
        if self.stored:
            from pipeline.evaluate.stored import name_of

            names = {name_of(form.storage) for form in self.stored}
            if taken := sorted(names & self.models.keys()):
                raise ValueError(f"models: '{taken[0]}' is the name of a form in stored: choose another key")
        return self
