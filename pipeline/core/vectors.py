"""Embeddings against embeddings by cosine: own answers' ranks, the nearest, shared neighbours, how narrow a cone.

Similarities are computed in blocks of rows, so that memory grows with N and not with its square.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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
    """Rank the answer of row i among all answers for query i.

    Args:
        queries: `[N, e]`, of any length.
        answers: `[N, e]`, of any length.
    """
    blocks = []
    for rows, cosines in _blocks(unit(queries), unit(answers)):
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
    wanted = unit(queries.astype(np.float32))
    rows, best = np.empty((len(wanted), 0), np.int64), np.empty((len(wanted), 0), np.float32)
    seen = 0
    for chunk in corpus:
        against = unit(chunk.astype(np.float32))
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
    """The rows of the `count` vectors nearest to each, itself left out, in no order: int64 `[N, count]`.

    Args:
        vectors: `[N, e]`, of any length; N must be larger than `count`.
        count: at least 1.
    """
    directions, found = unit(vectors), []
    for rows, cosines in _blocks(directions, directions):
        cosines[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        found.append(nearest.copy())  # a view would keep the whole block
    return np.concatenate(found)


def shared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of two neighbourhoods `[N, k]` a row: the share of the first that is in the second, `[N]`."""
    return np.array([np.isin(mine, theirs).mean() for mine, theirs in zip(first, second, strict=True)])


def anisotropy(vectors: np.ndarray) -> float:
    """Mean cosine of all pairs of different rows of `[N, e]`, N at least 2: 0 = spread evenly, 1 = one direction."""
    directions = unit(vectors.astype(np.float64))
    total, own = directions.sum(axis=0), (directions * directions).sum()
    return float((total @ total - own) / (len(directions) * (len(directions) - 1)))


def _blocks(queries: np.ndarray, answers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK] @ answers.T
        yield np.arange(start, start + len(block)), block


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of `[N, e]` at length 1; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)


def embeddings_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed_size_list column as float32 `[N, e]`."""
    array = column.combine_chunks()
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.reshape(len(array), -1), dtype=np.float32)
