"""Ridge regression from running sums: memory depends on the widths, not on the number of rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from torch.nn import Linear


LEAST_VARIANCE = 1e-12
"""Share of the largest variance below which a direction is rounding."""


@dataclass(frozen=True)
class LinearMap:
    """`y = x @ weight.T + bias` with weight `[e, d]` and bias `[e]`, float64."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """`[N, e]` of features `[N, d]`."""
        return features @ self.weight.T + self.bias

    @classmethod
    def of_layer(cls, layer: "Linear") -> Self:
        """What a layer computes."""
        return cls(*(part.detach().double().cpu().numpy() for part in (layer.weight, layer.bias)))

    def write_to(self, layer: "Linear") -> None:
        """Make a layer compute this."""
        import torch

        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.weight))
            layer.bias.copy_(torch.from_numpy(self.bias))


@dataclass(frozen=True)
class Moments:
    """The sums over N pairs of features and targets that least squares needs, float64.

    Second moments are around the means: raw squares would lose digits of hidden states, whose mean is large.

    Attributes:
        mean: of the features `[d]`; `target_mean` is `[e]`.
        scatter: sum of products of centred features `[d, d]`.
        cross: sum of products of centred features and centred targets `[d, e]`.
    """

    count: int
    mean: np.ndarray
    target_mean: np.ndarray
    scatter: np.ndarray
    cross: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, targets: np.ndarray) -> Self:
        """Moments of rows in memory, features `[N, d]` and targets `[N, e]`."""
        first, second = features.astype(np.float64), targets.astype(np.float64)
        mean, target_mean = first.mean(0), second.mean(0)
        centred = first - mean
        return cls(len(first), mean, target_mean, centred.T @ centred, centred.T @ (second - target_mean))

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of the rows of both."""
        count = self.count + other.count
        moved, target_moved = other.mean - self.mean, other.target_mean - self.target_mean
        weight = self.count * other.count / count
        return Moments(
            count,
            self.mean + moved * (other.count / count),
            self.target_mean + target_moved * (other.count / count),
            self.scatter + other.scatter + weight * np.outer(moved, moved),
            self.cross + other.cross + weight * np.outer(moved, target_moved),
        )

    @classmethod
    def none(cls, features: int, targets: int) -> Self:
        """Moments of no row, for `summed`."""
        zeros = np.zeros
        return cls(0, zeros(features), zeros(targets), zeros((features, features)), zeros((features, targets)))

    def summed(self, total: Callable[[np.ndarray], np.ndarray]) -> "Moments":
        """Moments of the rows of all processes, over which `total` sums an array."""
        count = int(total(np.array([float(self.count)]))[0])
        mean = total(self.count * self.mean) / max(1, count)
        target_mean = total(self.count * self.target_mean) / max(1, count)
        moved, target_moved = self.mean - mean, self.target_mean - target_mean
        scatter = total(self.scatter + self.count * np.outer(moved, moved))
        return Moments(
            count, mean, target_mean, scatter, total(self.cross + self.count * np.outer(moved, target_moved))
        )

    def mapped(self, by: LinearMap) -> "Moments":
        """Moments of the same rows after a linear map of their features."""
        return Moments(
            self.count,
            by(self.mean),
            self.target_mean,
            by.weight @ self.scatter @ by.weight.T,
            by.weight @ self.cross,
        )


def fit_ridge(moments: Moments, strengths: Sequence[float]) -> Iterator[LinearMap]:
    """Ridge regression with an intercept on standardised features, as a map of the raw ones.

    Yields one map per strength (penalty on the coefficients), all from one eigendecomposition. Strength 0 gives the
    smallest coefficients of those that fit best: fewer rows than features leave directions in which nothing varies.
    """
    spread = np.sqrt(np.diagonal(moments.scatter) / moments.count)
    spread = np.where(spread > 1e-9, spread, 1.0)  # a feature that never varies explains nothing
    values, vectors = np.linalg.eigh(moments.scatter / np.outer(spread, spread))
    projected = vectors.T @ (moments.cross / spread[:, None])
    varies = (values > LEAST_VARIANCE * values.max())[:, None]
    for strength in strengths:
        coefficients = np.divide(projected, (values + strength)[:, None], out=np.zeros_like(projected), where=varies)
        weight = (vectors @ coefficients).T / spread
        yield LinearMap(weight, moments.target_mean - weight @ moments.mean)
