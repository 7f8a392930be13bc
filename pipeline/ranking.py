"""Where each query's own answer ranks among all answers, by cosine."""

from dataclasses import dataclass

import numpy as np


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
    cosines = _unit(queries) @ _unit(answers).T
    own = np.diagonal(cosines)
    return Ranked(own.copy(), (cosines >= own[:, None]).sum(axis=1), cosines.argmax(axis=1))


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)
