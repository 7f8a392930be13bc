"""Section `collect` of params.yaml."""

from pydantic import Field, ValidationInfo, field_validator

from pipeline.collect.decontamination import DecontaminateParams
from pipeline.collect.near_duplicates import NearDuplicateParams
from pipeline.core.config import Params
from pipeline.core.readers import Source


class CollectParams(Params):
    """Which queries to learn from."""

    local_dir: str = Field(description="relative source paths start here")
    sources: list[Source] = Field(min_length=1)
    min_chars: int = Field(default=2, ge=1)
    max_chars: int = Field(default=8000, ge=1)
    max_tokens: int | None = Field(default=512, ge=1, description="backbone tokens; null: no limit")
    languages: list[str] | None = Field(default=None, min_length=1, description="ISO 639 codes to keep; null: all")
    language_confidence: float = Field(default=0.99, gt=0.5, lt=1, description="how sure another language must be")
    decontaminate: DecontaminateParams | None = Field(default=None, description="against suites and probes; null: off")
    near_duplicates: NearDuplicateParams | None = Field(default=None, description="null: only equal texts go")
    sample: int | None = Field(
        default=None, ge=1, validate_default=True, description="rows to keep, by content hash; null: all"
    )
    heldout_fraction: float = Field(default=0.01, gt=0, lt=1)
    seed: int = 0

    @property
    def weights(self) -> list[float] | None:
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None

    @field_validator("sources")
    @classmethod
    def _weights_of_all(cls, sources: list[Source]) -> list[Source]:
        without = [source.label for source in sources if source.weight is None]
        if without and len(without) < len(sources):
            raise ValueError(f"either all sources have a weight or none: missing for {', '.join(without)}")
        return sources

    @field_validator("sample")
    @classmethod
    def _weights_share_a_sample(cls, sample: int | None, info: ValidationInfo) -> int | None:
        if sample is None and any(source.weight is not None for source in info.data.get("sources", [])):
            raise ValueError("the weights of collect.sources share out a sample: set its size, or drop the weights")
        return sample
