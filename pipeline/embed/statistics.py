"""Statistics of the targets, gathered while they are written, and the measures that gates limit."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.distinct import Distinct
from pipeline.core.histogram import Histogram
from pipeline.core.schemas import QUERY_EMBEDDING
from pipeline.core.vectors import Anisotropy, matrix
from pipeline.embed.targets import QUERY_TRUNCATED

# Measure of a gate -> what it counts and what to do.
CAUSES = {
    "equal": "of the targets repeat another row's: the teacher gives one vector for different texts, or answers repeat",
    "zero": "of the targets have length 0: the teacher reads nothing in those answers",
    "odd_length": "of the targets are over 10 times longer or shorter than the median: try a teacher in float32",
    "cosine": "is the mean cosine of two targets, which all point one way: take another pooling, or a transform",
}
ODD_FACTOR = 10.0


@dataclass
class TargetStatistics:
    """Statistics so far: `tokens` that the teacher read of each text, texts that it `truncated`, lengths of vectors.

    Of queries beside the responses it counts those that were truncated alone.
    """

    rows: int = 0
    truncated: int = 0
    truncated_queries: int = 0
    tokens: Histogram = field(default_factory=Histogram)
    anisotropy: Anisotropy = field(default_factory=Anisotropy)
    _sum: float = field(default=0.0, repr=False)
    _squares: float = field(default=0.0, repr=False)
    _lengths: list[np.ndarray] = field(default_factory=list, repr=False)
    _distinct: Distinct = field(default_factory=Distinct, repr=False)

    def through(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Count the tables of `targets.Finish` and pass on their columns of `schemas.targets_schema`."""
        for table in tables:
            if table.num_rows:
                self._add(table)
            yield table.select([name for name in ("id", "embedding", QUERY_EMBEDDING) if name in table.column_names])

    def norms(self) -> dict[str, float]:
        """`norm_mean` and `norm_std` so far."""
        mean = self._sum / self.rows if self.rows else 0.0
        variance = self._squares / self.rows - mean**2 if self.rows else 0.0
        return {"norm_mean": round(mean, 6), "norm_std": round(math.sqrt(max(variance, 0.0)), 6)}

    def measures(self) -> dict[str, float]:
        """The measures of `params.TargetGates`."""
        if not self.rows:
            return {}
        lengths = np.concatenate(self._lengths)
        usual = float(np.median(lengths))
        odd = (lengths > ODD_FACTOR * usual) | (lengths < usual / ODD_FACTOR)
        return {
            "equal": 1 - self._distinct.count / self.rows,
            "zero": float((lengths == 0).mean()),
            "odd_length": float(odd.mean()),
            "cosine": self.anisotropy.value or 0.0,
        }

    def _add(self, table: pa.Table) -> None:
        vectors = matrix(table.column("embedding"))
        squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64)
        self.rows += len(squares)
        self.anisotropy.add(vectors)
        self._lengths.append(np.sqrt(squares).astype(np.float32))
        self._distinct.add(hash(vector.tobytes()) for vector in vectors)
        self._sum += float(np.sqrt(squares).sum())
        self._squares += float(squares.sum())
        self.truncated += pc.sum(table.column("truncated")).as_py()
        if QUERY_TRUNCATED in table.column_names:
            self.truncated_queries += pc.sum(table.column(QUERY_TRUNCATED)).as_py()
        self.tokens.add(table.column("tokens").to_pylist())
