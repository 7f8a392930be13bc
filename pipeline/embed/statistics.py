"""What the targets are like, counted as they are written: lengths of vectors, tokens of texts."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.run import Histogram

if TYPE_CHECKING:
    import numpy as np

BLOCK_ROWS = 4096


class Anisotropy:
    """Mean cosine of all pairs of different vectors, of any number: 0 = spread evenly, 1 = all point one way."""

    def __init__(self) -> None:
        """No vector yet."""
        self.rows = 0
        self._sum: Any = 0.0
        self._own = 0.0

    def add(self, vectors: "np.ndarray[Any, Any]") -> None:
        """Take in `[N, d]`."""
        import numpy as np

        self.rows += len(vectors)
        for start in range(0, len(vectors), BLOCK_ROWS):
            exact = vectors[start : start + BLOCK_ROWS].astype(np.float64)
            lengths = np.linalg.norm(exact, axis=1, keepdims=True)
            unit = np.divide(exact, lengths, out=np.zeros_like(exact), where=lengths > 0)
            self._sum = self._sum + unit.sum(0)
            self._own += float((unit * unit).sum())

    @property
    def value(self) -> float | None:
        """Of the vectors so far; None of fewer than two."""
        if self.rows < 2:
            return None
        return round(float(self._sum @ self._sum - self._own) / (self.rows * (self.rows - 1)), 6)


@dataclass
class TargetStatistics:
    """Mean and standard deviation of the targets' lengths (their scale decides the balance of the losses), and how
    long their texts were.

    Attributes:
        rows: targets so far.
        truncated: those whose text lost its end.
        tokens: that the teacher read of each text.
        anisotropy: of the targets.
    """

    rows: int = 0
    truncated: int = 0
    tokens: Histogram = field(default_factory=Histogram)
    anisotropy: Anisotropy = field(default_factory=Anisotropy)
    _sum: float = field(default=0.0, repr=False)
    _squares: float = field(default=0.0, repr=False)

    def through(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The tables (schema `targets.store_schema`) as `contracts.targets_schema`, counted."""
        for table in tables:
            if table.num_rows:
                self._add(table)
            yield table.select(["id", "embedding"])

    def norms(self) -> dict[str, float]:
        """`norm_mean` and `norm_std` so far."""
        mean = self._sum / self.rows if self.rows else 0.0
        variance = self._squares / self.rows - mean**2 if self.rows else 0.0
        return {"norm_mean": round(mean, 6), "norm_std": round(math.sqrt(max(variance, 0.0)), 6)}

    def _add(self, table: pa.Table) -> None:
        import numpy as np

        column = table.column("embedding").combine_chunks()
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
        self.rows += len(squares)
        self.anisotropy.add(vectors)
        self._sum += float(np.sqrt(squares).sum())
        self._squares += float(squares.sum())
        self.truncated += pc.sum(table.column("truncated")).as_py()
        self.tokens.add(table.column("tokens").to_pylist())
