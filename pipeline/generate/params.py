"""Section `generate` of params.yaml."""

from typing import Any, Literal

from pydantic import Field

from pipeline.backbone.loading import DType
from pipeline.core.config import Params
from pipeline.generate.engines import EngineFacts, EngineName
from pipeline.generate.engines.base import Sampling
from pipeline.parallel.devices import Count

VERSION = 1  # goes up when the same answer of an engine gives another row

TooLong = Literal["keep_start", "keep_end", "drop"]


class GenerateParams(Params):
    """Section `generate`."""

    engine: EngineName
    dtype: DType = Field(description="of the weights that generate")
    max_new_tokens: int = Field(ge=1)
    max_prompt_tokens: int = Field(ge=1, description="template included")
    too_long: TooLong = Field(default="keep_start", description="what becomes of a query that is longer")
    temperature: float = Field(default=0.0, ge=0, description="0 = greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, description="of sampling; each row has its own, derived from this and its id")
    strip_thinking: bool = Field(default=True, description="leave out <think> blocks that come all the same")
    max_failed_fraction: float = Field(
        default=0.01, ge=0, le=1, description="more failed rows than this fail the stage"
    )
    data_parallel: Count = Field(default="auto", description="engine processes; auto: one a GPU group")
    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that share one copy of the weights")
    batch_invariant: bool = Field(default=False, description="vLLM on a GPU: equal answers in every batch, slower")
    options: dict[str, Any] = Field(default_factory=dict, description="the engine's own options")

    @property
    def sampling(self) -> Sampling:
        """The decoding params that engines take."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    def content(self, facts: EngineFacts) -> dict[str, Any]:
        """What decides the bytes of a row: all params but those of speed and tolerance."""
        options = {key: value for key, value in self.options.items() if key not in facts.speed_options}
        no_matter = {"max_failed_fraction", "data_parallel", "tensor_parallel"}
        if self.temperature == 0:
            no_matter |= {"seed", "top_p"}
        versions = {"version": VERSION, "engine_version": facts.version}
        return self.model_dump(exclude=no_matter) | versions | {"options": options, "stub": facts.stub}
