"""An affine map from the teacher's space to the space that the student is trained in, and back.

    trained space = (teacher's vector - mean) @ forward          what the student learns and `Encoder.encode` gives
    teacher's space = trained vector @ inverse + mean            `Encoder.encode(..., space="teacher")`

`embed` fits it (`embed/transform_fit.py`) on the training responses and writes `transform.safetensors` beside the
targets; `train` copies the file into the encoder's folder. A diagonal map is stored as its diagonal.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.core.config import Params, check_unread_keys
from pipeline.core.errors import TeacherError
from pipeline.core.files import bytes_sha256, digest_of, write_bytes
from pipeline.core.vectors import unit_rows

TRANSFORM_FILE = "transform.safetensors"
# Rows mapped at once, in float64.
BLOCK_ROWS = 4096

Kind = Literal["auto", "none", "center", "standardize", "whiten", "remove-components", "rotate"]
Space = Literal["trained", "teacher"]

# The keys that only some kinds read; elsewhere they must keep their defaults.
_READ_BY: dict[str, tuple[Kind, ...]] = {
    "components": ("whiten", "remove-components"),
    "shrinkage": ("standardize", "whiten"),
    "decorrelate": ("standardize",),
    "epsilon": ("standardize", "whiten"),
    "rotate": ("center", "standardize", "remove-components"),
}


class TransformParams(Params):
    """The map of the teacher's vectors to targets (`embed.transform`)."""

    kind: Kind = Field(
        default="none", description="auto: standardize where the targets of training queries are anisotropic, else none"
    )
    components: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="of remove-components: how many go; of whiten: how many stay, null = all"
    )
    shrinkage: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        default="auto",
        description="of whiten: share of equal variances in the covariance, auto: Ledoit and Wolf's; of decorrelate: "
        "share of no correlation in the correlations, auto: Schäfer and Strimmer's",
    )
    decorrelate: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="of standardize: how much of the correlation between dimensions goes, as a power; 1 = all of it",
    )
    epsilon: float = Field(
        default=1e-9, ge=0, lt=1, description="directions with less of the largest variance are left at 0"
    )
    rotate: bool = Field(
        default=False,
        description="of center, standardize and remove-components: turn the result, most variance in the first "
        "dimensions; kind rotate turns the vectors as they are, whiten orders its components itself",
    )

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        check_unread_keys(self, {key for key, kinds in _READ_BY.items() if self.kind not in kinds})
        if self.kind == "standardize" and not self.decorrelate and self.shrinkage != "auto":
            raise ValueError("kind standardize takes no shrinkage without decorrelate")
        if self.kind == "remove-components" and self.components is None:
            raise ValueError("kind remove-components needs components: how many of the leading ones go, e.g. 1")
        return self


STANDARDIZE = TransformParams(kind="standardize")
# The best on four parts of tasks with SmolLM2-135M, of powers .25 to 1 and shrinkage to .6 (docs/results.md).
DECORRELATE = TransformParams(kind="standardize", decorrelate=0.5, shrinkage=0.3)


@dataclass(frozen=True)
class TargetTransform:
    """The fitted map between the teacher's space (d dimensions) and the trained space (e dimensions).

    Attributes:
        kind: see `TransformParams`; ", rotated" behind it where that came after.
        unit_length: whether the teacher's vectors are scaled to length 1 first (`embed.normalize`).
        mean: float32 `[d]`.
        forward: float32 `[d, e]`, or `[d]` where it is diagonal.
        inverse: float32 `[e, d]`, or `[d]` where it is diagonal.
    """

    kind: str
    unit_length: bool
    mean: np.ndarray
    forward: np.ndarray
    inverse: np.ndarray

    @property
    def teacher_width(self) -> int:
        """d, dimensions of the teacher's vectors."""
        return len(self.mean)

    @property
    def width(self) -> int:
        """e, dimensions of the targets."""
        return int(self.forward.shape[-1])

    @property
    def diagonal(self) -> bool:
        """Whether each dimension is mapped by itself."""
        return self.forward.ndim == 1

    @property
    def identity(self) -> dict[str, str]:
        """Its kind, and the sha256 over its numbers."""
        hashes = [bytes_sha256(np.ascontiguousarray(value).data) for value in (self.mean, self.forward, self.inverse)]
        return {"kind": self.kind, "sha256": digest_of([self.unit_length, *hashes])}

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """The teacher's vectors `[N, d]`, of any length, mapped to float32 `[N, e]`."""
        if self.unit_length:
            vectors = unit_rows(vectors)
        return self.map(vectors)

    def map(self, vectors: np.ndarray) -> np.ndarray:
        """As a call, for vectors that have length 1 already if `unit_length`."""
        return _blockwise(vectors, self.width, lambda rows: _times(rows - self.mean, self._exact[0]))

    def invert(self, embeddings: np.ndarray) -> np.ndarray:
        """Vectors `[N, e]` mapped back to float32 `[N, d]`; removed directions get their training mean."""
        return _blockwise(embeddings, self.teacher_width, lambda rows: _times(rows, self._exact[1]) + self.mean)

    @cached_property
    def _exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Forward and inverse in float64."""
        return self.forward.astype(np.float64), self.inverse.astype(np.float64)

    def to_bytes(self) -> bytes:
        """The content of `TRANSFORM_FILE`; equal maps give equal bytes."""
        from safetensors.numpy import save

        # One key: safetensors keeps several in no fixed order.
        facts = json.dumps({"kind": self.kind, "unit_length": self.unit_length}, sort_keys=True)
        tensors = {"mean": self.mean, "forward": self.forward, "inverse": self.inverse}
        return save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, {"transform": facts})

    def save(self, folder: Path) -> None:
        """Write `TRANSFORM_FILE` into a folder."""
        write_bytes(folder / TRANSFORM_FILE, self.to_bytes())


def load_transform(folder: Path) -> TargetTransform | None:
    """The transform in a folder of targets or of an encoder; None without one.

    Raises:
        TeacherError: its file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / TRANSFORM_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["transform"])
            mean, forward, inverse = (file.get_tensor(name) for name in ("mean", "forward", "inverse"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TeacherError(f"{path} is damaged ({error}): run embed and train again") from None
    return TargetTransform(str(facts["kind"]), bool(facts["unit_length"]), mean, forward, inverse)


def _times(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return rows * matrix if matrix.ndim == 1 else rows @ matrix


def _blockwise(rows: np.ndarray, width: int, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    result = np.empty((len(rows), width), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        result[start : start + BLOCK_ROWS] = compute(rows[start : start + BLOCK_ROWS].astype(np.float64))
    return result
