"""Statistics of the targets, gathered while they are written."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.histogram import Histogram
from pipeline.core.vectors import Anisotropy, matrix


@dataclass
class TargetStatistics:
    """Statistics so far: `tokens` that the teacher read of each text, texts that it `truncated`, lengths of vectors."""

    rows: int = 0
    truncated: int = 0
    tokens: Histogram = field(default_factory=Histogram)
    anisotropy: Anisotropy = field(default_factory=Anisotropy)
    _sum: float = field(default=0.0, repr=False)
    _squares: float = field(default=0.0, repr=False)

    def through(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Count the tables (schema `targets.store_schema`) and pass on their columns of `schemas.targets_schema`."""
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
        vectors = matrix(table.column("embedding"))
        squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
        self.rows += len(squares)
        self.anisotropy.add(vectors)
        self._sum += float(np.sqrt(squares).sum())
        self._squares += float(squares.sum())
        self.truncated += pc.sum(table.column("truncated")).as_py()
        self.tokens.add(table.column("tokens").to_pylist())
