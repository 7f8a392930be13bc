"""Section `generate` of params.yaml."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from pipeline.backbone.loading import DType
from pipeline.core.config import Params
from pipeline.core.tracking import Tracker
from pipeline.generate.engines.base import Sampling
from pipeline.generate.engines.registry import ENGINES, EngineName
from pipeline.parallel.devices import Count

VERSION = 2  # goes up if the same answer of an engine gives another row

TooLong = Literal["keep_start", "keep_end", "drop"]


class AnswerGates(Params):
    """Largest shares of the answered rows, 0 to 1; more of them fail the stage, and its answers are kept."""

    empty: float = Field(default=0.1, ge=0, le=1, description="without a character")
    equal: float = Field(default=0.5, ge=0, le=1, description="that repeat another row's answer")
    thinking: float = Field(default=0.05, ge=0, le=1, description="with thinking that strip_thinking left")
    cut: float = Field(default=1.0, ge=0, le=1, description="that end at max_new_tokens")
    equal_prompts: float = Field(default=0.1, ge=0, le=1, description="that repeat another row's prompt")


class GenerateParams(Params):
    """How the backbone answers the queries."""

    engine: EngineName
    dtype: DType = Field(description="of the weights that generate")
    system: str | None = Field(default=None, description="system turn before each query; null = none of ours")
    max_new_tokens: int = Field(ge=1)
    max_prompt_tokens: int = Field(ge=1, description="template included")
    too_long: TooLong = Field(default="keep_start", description="what happens to a longer query")
    temperature: float = Field(default=0.0, ge=0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    samples_per_query: int = Field(
        default=1, ge=1, le=100, description="answers; a target is the mean of their embeddings"
    )
    seed: int = Field(default=0, ge=0, description="of sampling; each row has its own, derived from this and its id")
    strip_thinking: bool = Field(default=True, description="leave thinking out of the answers")
    max_failed_fraction: float = Field(
        default=0.01, ge=0, le=1, description="more failed rows than this fail the stage"
    )
    data_parallel: Count = Field(default="auto", description="engine processes; auto: one a GPU group")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that share one copy of the weights")
    batch_invariant: bool = Field(default=False, description="vLLM on a GPU: equal answers in every batch, slower")
    options: dict[str, Any] = Field(default_factory=dict, description="the engine's own options")
    track: Tracker | None = Field(default=None, exclude=True, description="progress and tokens a second, live")
    gates: AnswerGates = Field(default=AnswerGates(), description="what may be wrong with the answers")

    @field_validator("samples_per_query")
    @classmethod
    def _samples_differ(cls, samples: int, info: ValidationInfo) -> int:
        if samples > 1 and info.data.get("temperature") == 0:
            raise ValueError(f"{samples} greedy answers would be one: set a temperature above 0, or 1 sample")
        return samples

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    def content(self) -> dict[str, Any]:
        """The params that decide the bytes of an answer: all but those of speed, tolerance and number."""
        entry = ENGINES[self.engine]
        engine = entry.engine()
        options = {key: value for key, value in self.options.items() if key not in engine.SPEED_OPTIONS}
        excluded = {"max_failed_fraction", "data_parallel", "tensor_parallel", "gates", "samples_per_query"}
        if self.temperature == 0:
            excluded |= {"seed", "top_p"}
        if self.system is None:  # rows from before there was one keep their fingerprint
            excluded |= {"system"}
        versions = {"version": VERSION, "engine_version": engine.VERSION}
        return self.model_dump(exclude=excluded) | versions | {"options": options, "stub": bool(entry.stub)}
