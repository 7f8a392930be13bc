"""Readings of the backbone, standardised or decorrelated over training queries: baselines that cost no training.

Hidden states share a large mean and a few large dimensions, which say little of the text. Over mean and standard
deviation of queries that the system has read in the same way, they are embeddings that a trained student must beat.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.artifacts import Artifact
from pipeline.core.errors import EvaluationError, TeacherError
from pipeline.core.paths import TRAIN_TABLE
from pipeline.core.target_transform import STANDARDIZE, TargetTransform, TransformParams
from pipeline.embed.transform_fit import LEAST_ROWS, fit_transform
from pipeline.evaluate.system import System, encode_finite
from pipeline.tasks.instructions import Side

if TYPE_CHECKING:
    from pipeline.encoder.head import Reading

STANDARDIZATION_FILE = "standardization.safetensors"
MOST_TEXTS = 2_000
"""Training queries that mean and deviation are fitted on: both are then known to some 2 % of a deviation."""


def fit_standardization(vectors: np.ndarray, params: TransformParams = STANDARDIZE) -> TargetTransform:
    """`embed.transform` of kind standardize, fitted on readings `[N, d]`; EvaluationError if all rows are equal."""
    try:
        return fit_transform(params, [vectors], unit_length=False).transform
    except TeacherError:
        raise EvaluationError(
            f"the backbone reads all {len(vectors)} texts alike, so nothing can be standardised: is a limit of tokens "
            "(train.max_query_tokens) too small?"
        ) from None


@dataclass(frozen=True)
class StandardizedSystem:
    """A `System` around another, whose embeddings it standardises or decorrelates.

    Attributes:
        name: of this system; the other keeps its own, and its embeddings in the cache.
        transform: fitted on training queries that `system` has read.
    """

    name: str
    system: System
    transform: TargetTransform

    @classmethod
    def fitted(cls, name: str, system: System, texts: Sequence[str], params: TransformParams) -> "StandardizedSystem":
        """Read `texts` without an instruction and fit.

        Raises EvaluationError if there are fewer than two texts, or a reading is not finite.
        """
        if len(texts) < LEAST_ROWS:
            raise EvaluationError(f"{name}: data/queries has {len(texts)} training queries, two at least are needed")
        vectors = encode_finite(system, texts, where="training queries")
        return cls(name, system, fit_standardization(vectors, params))

    @classmethod
    def of_reading(cls, name: str, system: System, reading: "Reading") -> "StandardizedSystem":
        """As a reading does it that was fitted on training queries which `system` would read in the same way."""
        mean, scale = reading.mean.numpy(), reading.scale.numpy()
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        return cls(name, system, TargetTransform("standardize", False, mean, scale, inverse))

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.system.identity, "standardized": self.transform.identity["sha256"]}

    @property
    def prompting(self) -> str:
        how = "standardised" if self.transform.diagonal else "decorrelated"
        return f"{self.system.prompting}; {how} over training queries"

    @property
    def embeddings_dtype(self) -> str:
        """What the readings are rounded to before they are standardised; scores with another one are others."""
        return getattr(self.system, "embeddings_dtype", "float32")

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        return self.system.cache_key(text, instruction, side)

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        return self.transform(self.system.encode(texts, instruction, side))


def standardization_bytes(transforms: Mapping[str, TargetTransform]) -> bytes:
    """The content of `STANDARDIZATION_FILE`: `<system>.mean` `[d]` and `<system>.scale`, by system.

    The scale is `[d]`, or of decorrelated ones a matrix `[d, d]`: (vector - mean) @ scale. All are float32.
    """
    from safetensors.numpy import save

    return save(
        {
            f"{name}.{part}": np.ascontiguousarray(value)
            for name, found in transforms.items()
            for part, value in (("mean", found.mean), ("scale", found.forward))
        }
    )


def training_texts(queries: Artifact) -> list[str]:
    """The first training queries by id, which is a hash: a sample that depends on no order."""
    batches = queries.batches(["text"], MOST_TEXTS, TRAIN_TABLE)
    return list(islice(chain.from_iterable(batch["text"].to_pylist() for batch in batches), MOST_TEXTS))
