"""How faithful a decoded text is: cosines in the teacher's space, beside what chance would give.

The teacher embeds the decoded text. Near to the student's embedding: the text says what the embedding says. Near to the
teacher's embedding of the real response: the text says what the backbone would have answered. Teachers differ in how
near any two texts are to each other, so a cosine is read against that of shuffled pairs: each decoded text with every
row's counterpart but its own, a mean over all of them and so the same at every run.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.evaluation.statistics import BootstrapParams, Delta, delta_of, paired_delta, sample_means

Array = np.ndarray[Any, Any]

CHANCE = "chance"


@dataclass(frozen=True)
class Paired:
    """Cosines float32 `[N]` of N pairs, and of each first with the seconds of all other pairs on average."""

    own: Array
    chance: Array


class Summary(NamedTuple):
    """Mean cosine, the ends of its bootstrap interval (None without one), mean of shuffled pairs (None of one pair)."""

    mean: float
    low: float | None
    high: float | None
    chance: float | None


def pair(first: Array, second: Array) -> Paired:
    """Compare rows of `[N, e]` with rows of `[N, e]`, of any length; a zero vector is at cosine 0 to all.

    With one pair there is nothing to shuffle: its chance is NaN.
    """
    a, b = _unit(first), _unit(second)
    own = (a * b).sum(axis=1)
    others = len(a) - 1
    chance = (a @ b.sum(axis=0) - own) / others if others else np.full(len(a), np.nan)
    return Paired(own.astype(np.float32), chance.astype(np.float32))


def summary(metric: str, pairs: Paired, settings: BootstrapParams) -> Summary:
    """The mean over pairs with its interval; `metric` and the seed decide what is drawn."""
    interval = delta_of(metric, "", sample_means(metric, pairs.own, np.zeros_like(pairs.own), settings), settings)
    shuffled = pairs.chance[np.isfinite(pairs.chance)]
    return Summary(
        mean=round(float(pairs.own.mean(dtype=np.float64)), 6),
        low=interval.low,
        high=interval.high,
        chance=round(float(shuffled.mean(dtype=np.float64)), 6) if len(shuffled) else None,
    )


def over_chance(metric: str, pairs: Paired, settings: BootstrapParams) -> Delta | None:
    """How far the pairs are above shuffled ones, and whether that is more than noise; None of one pair."""
    if not np.isfinite(pairs.chance).all():
        return None
    return paired_delta(metric, CHANCE, pairs.own, pairs.chance, settings)


def _unit(vectors: Array) -> Array:
    wide = vectors.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float32).tiny)
