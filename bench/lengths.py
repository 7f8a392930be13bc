"""Lengths in tokens that spread as those of queries and answers do, and what batches of them cost in padding."""

from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

LIMIT = 512
LEAST = 4


def log_normal(count: int, mean: int, spread: float) -> list[int]:
    """Log-normal lengths in tokens from `LEAST` to `LIMIT` with this mean, ascending.

    They lie at evenly spaced quantiles, so that few rows hold the tail too.
    """
    normal = NormalDist()
    raw = np.exp([spread * normal.inv_cdf((index + 0.5) / count) for index in range(count)])
    scale = 1.0
    for _ in range(50):
        cut = np.clip(raw * scale, LEAST, LIMIT)
        scale *= mean / cut.mean()
    return [round(value) for value in cut]


def chunks(values: list[int], size: int) -> Iterator[list[int]]:
    """Consecutive pieces, the last may be shorter."""
    return (values[start : start + size] for start in range(0, len(values), size))


def padded(lengths: Sequence[int], batch: int) -> float:
    """How many times the real tokens the batches hold when each is padded to its longest row."""
    return sum(max(rows) * len(rows) for rows in chunks(list(lengths), batch)) / sum(lengths)
