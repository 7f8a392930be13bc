"""Embeddings as matrices: read from columns, scaled, compared by cosine.

Cosines are computed in blocks of rows, so memory grows with N and not with its square.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

BLOCK = 1024  # rows of similarities held at once


@dataclass(frozen=True)
class Ranked:
    """Of each of N queries: cosine to its own answer `[N]`, that answer's rank `[N]`, the nearest answer's row `[N]`.

    Rank 1 is best; ties count against.
    """

    cosines: np.ndarray
    ranks: np.ndarray
    nearest: np.ndarray

    @property
    def cosine(self) -> float:
        """Mean cosine to the own answer."""
        return float(self.cosines.mean())

    @property
    def top1(self) -> float:
        """Share of queries whose own answer ranks first."""
        return float((self.ranks == 1).mean())

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank of the own answer."""
        return float((1.0 / self.ranks).mean())


def rank_own(queries: np.ndarray, answers: np.ndarray) -> Ranked:
    """Rank the answer of row i among all answers for query i; both `[N, e]`, of any length."""
    blocks = []
    for rows, cosines in _blocks(unit_rows(queries), unit_rows(answers)):
        own = cosines[np.arange(len(rows)), rows]
        blocks.append((own, (cosines >= own[:, None]).sum(axis=1), cosines.argmax(axis=1)))
    own, ranks, nearest = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return Ranked(own, ranks, nearest)


def top_k(queries: np.ndarray, corpus: Iterable[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each query the `count` vectors of a corpus of any size that are nearest to it, exactly.

    Args:
        queries: `[N, e]`, of any length.
        corpus: chunks `[B, e]` of any length; one is held at a time.
        count: at least 1; fewer come back of a smaller corpus.

    Returns:
        Rows in the corpus int64 `[N, k]` and their cosines float32 `[N, k]`, best first; of equal ones the first.
    """
    wanted = unit_rows(queries.astype(np.float32))
    rows, best = np.empty((len(wanted), 0), np.int64), np.empty((len(wanted), 0), np.float32)
    seen = 0
    for chunk in corpus:
        against = unit_rows(chunk.astype(np.float32))
        found = np.broadcast_to(np.arange(seen, seen + len(chunk)), (min(BLOCK, len(wanted)), len(chunk)))
        parts = [
            _best(np.hstack([rows[at], found[: len(at)]]), np.hstack([best[at], cosines]), count)
            for at, cosines in _blocks(wanted, against)
        ]
        if parts:
            rows, best = (np.concatenate(each) for each in zip(*parts, strict=True))
        seen += len(chunk)
    return rows, best


def _best(rows: np.ndarray, cosines: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates stand in the order of the corpus where their cosines are equal, and a stable sort keeps it."""
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(cosines, order, axis=1)


def neighbours(vectors: np.ndarray, count: int) -> np.ndarray:
    """The rows of the `count` < N vectors nearest to each of `[N, e]` but itself, in no order: int64 `[N, count]`."""
    directions, found = unit_rows(vectors), []
    for rows, cosines in _blocks(directions, directions):
        cosines[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        found.append(nearest.copy())  # a view would keep the whole block
    return np.concatenate(found)


def neighbour_overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """For each row of two sets of neighbours `[N, k]`: the share of the first that is in the second, `[N]`."""
    return np.array([np.isin(mine, theirs).mean() for mine, theirs in zip(first, second, strict=True)])


class Anisotropy:
    """Mean cosine of all pairs of different rows, in any number of batches: 0 = spread evenly, 1 = one direction."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum: Any = 0.0  # of unit rows, [e]
        self._own = 0.0  # sum of their squared lengths: 1 each, 0 for zero rows

    def add(self, vectors: np.ndarray) -> None:
        """Add rows `[N, e]`."""
        self.rows += len(vectors)
        for start in range(0, len(vectors), BLOCK):
            directions = unit_rows(vectors[start : start + BLOCK].astype(np.float64))
            self._sum = self._sum + directions.sum(axis=0)
            self._own += float((directions * directions).sum())

    @property
    def value(self) -> float | None:
        """Of the rows so far, rounded to 6 digits; None of fewer than two."""
        if self.rows < 2:
            return None
        return round(float(self._sum @ self._sum - self._own) / (self.rows * (self.rows - 1)), 6)


def anisotropy(vectors: np.ndarray) -> float | None:
    """The `Anisotropy` of one array `[N, e]`."""
    running = Anisotropy()
    running.add(vectors)
    return running.value


def _blocks(queries: np.ndarray, answers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK] @ answers.T
        yield np.arange(start, start + len(block)), block


def principal_components(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances `[d]`, largest first, and their directions, the columns of `[d, d]`, of second moments `[d, d]`."""
    variances, directions = (values[..., ::-1] for values in np.linalg.eigh(moments))
    # The sign of an eigenvector is arbitrary: the largest entry is made positive.
    signs = np.sign(directions[np.abs(directions).argmax(0), np.arange(len(directions))])
    return variances.clip(0), directions * signs


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of `[N, e]` at length 1; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


def matrix(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column of lists of one length as float32 `[N, e]`, without a copy where the values are float32."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.reshape(len(array), -1), dtype=np.float32)
