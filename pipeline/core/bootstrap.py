"""Differences between the student and another system, with paired bootstrap intervals over queries, pairs or texts.

Units (a query, a pair, a text) are drawn with replacement, the same units for both systems, and the percentiles of the
resampled difference are its interval (Efron and Tibshirani 1993, chapter 13). It covers what another sample of units
would change, not what another training seed would.
"""

import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.core.config import Params

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Verdict = Literal["better", "worse", "within noise", "no interval"]

_BLOCK = 1_000_000  # resampled units in memory at once
_DEFINED = 0.9  # of the resamples must have a score
_FEWEST = 100  # resamples below which an interval's ends are arbitrary


class BootstrapParams(Params):
    """How the intervals of differences are drawn."""

    resamples: int = Field(default=2000, ge=0, description=f"0 = no intervals, else at least {_FEWEST}")
    level: float = Field(default=0.95, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if 0 < self.resamples < _FEWEST:
            raise ValueError(f"resamples ({self.resamples}) must be 0 or at least {_FEWEST}")
        return self


@dataclass(frozen=True)
class Delta:
    """Student minus `system`, and whether that is more than chance.

    Attributes:
        low, high: ends of the interval of `delta`; None without one.
        verdict: about the student; "within noise" where the interval holds 0, "no interval" where none can be drawn.
        units: resampled units (queries, pairs, texts); 0 where the score gives none.
    """

    metric: str
    system: str
    delta: float
    low: float | None
    high: float | None
    verdict: Verdict
    units: int


@dataclass(frozen=True)
class Sampled:
    """A score, or a difference of two, and its bootstrap replicates.

    Attributes:
        value: on all units.
        replicates: float64 [resamples]; None where none can be drawn.
    """

    value: float
    replicates: "Array | None"
    units: int


def paired_delta(
    metric: str,
    system: str,
    student: "Sequence[float] | Array",
    other: "Sequence[float] | Array",
    settings: BootstrapParams,
    *,
    lower_is_better: bool = False,
) -> Delta:
    """The difference of two means over the same units, `student` and `other` `[N]` in one order.

    Raises:
        ValueError: the two are not paired, or empty.
    """
    sampled = sample_means(metric, student, other, settings)
    return delta_of(metric, system, sampled, settings, lower_is_better=lower_is_better)


def statistic_delta(
    metric: str,
    system: str,
    statistic: "Callable[[Array], tuple[float, float]]",
    units: int,
    settings: BootstrapParams,
    *,
    lower_is_better: bool = False,
) -> Delta:
    """The difference of any statistic of the same units, e.g. of two rank correlations.

    `statistic` takes indices int64 [units] of units, with repeats; gives the value of the student and of `system`.
    """

    def difference(indices: "Array") -> "Array":
        import numpy as np

        values = np.array([statistic(row) for row in indices], dtype=np.float64)
        return np.asarray(values[:, 0] - values[:, 1])

    sampled = sample_statistic(metric, difference, units, settings)
    return delta_of(metric, system, sampled, settings, lower_is_better=lower_is_better)


def sample_means(
    metric: str, student: "Sequence[float] | Array", other: "Sequence[float] | Array", settings: BootstrapParams
) -> Sampled:
    """Replicates of the difference of two means over the same units, see `paired_delta`."""
    import numpy as np

    ours, theirs = np.asarray(student, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise ValueError(f"{metric}: units are not paired: {ours.shape} against {theirs.shape}")
    differences = ours - theirs
    return sample_statistic(metric, lambda indices: differences[indices].mean(axis=-1), len(ours), settings)


def sample_statistic(
    metric: str, statistic: "Callable[[Array], Array]", units: int, settings: BootstrapParams
) -> Sampled:
    """Replicates of a statistic. Calls with one metric, number of units and settings draw the same units.

    `statistic` takes indices int64 [B, units] of units; gives its value on each of the B rows, float64 [B].
    """
    import numpy as np
    from scipy.stats import DegenerateDataWarning, bootstrap

    everything = np.arange(units)
    value = float(statistic(everything[None])[0])
    if settings.resamples == 0 or units < 2:
        return Sampled(value, None, units)
    with warnings.catch_warnings():
        # A few units without a score in some resample (no positive pair in it): `_interval` deals with it.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        drawn = bootstrap(
            (everything,),
            lambda indices, axis: statistic(indices),
            n_resamples=settings.resamples,
            batch=max(1, _BLOCK // units),
            vectorized=True,
            method="percentile",
            # A stream for each metric: two tasks of one size must not share their draws where their means are combined.
            rng=np.random.default_rng([settings.seed, zlib.crc32(metric.encode())]),
        )
    return Sampled(value, np.asarray(drawn.bootstrap_distribution), units)


def combine(parts: Sequence[Sampled], weights: Sequence[float]) -> Sampled:
    """The weighted sum of values whose units were drawn independently; units add up.

    One part without replicates leaves the sum without: an interval must not claim that it covers what it does not.
    """
    value = float(sum(weight * part.value for part, weight in zip(parts, weights, strict=True)))
    units = sum(part.units for part in parts)
    drawn = [part.replicates for part in parts if part.replicates is not None]
    if len(drawn) < len(parts):
        return Sampled(value, None, units)
    total: Array | None = None
    for replicates, weight in zip(drawn, weights, strict=True):
        total = weight * replicates if total is None else total + weight * replicates
    return Sampled(value, total, units)


def delta_of(
    metric: str, system: str, sampled: Sampled, settings: BootstrapParams, *, lower_is_better: bool = False
) -> Delta:
    """The interval of a difference from its replicates, and what it says."""
    delta, low, high = round(sampled.value, 6), None, None
    if sampled.replicates is not None:
        low, high = _interval(sampled.replicates, settings.level)
    return Delta(metric, system, delta, low, high, _verdict(low, high, lower_is_better), sampled.units)


def _interval(replicates: "Array", level: float) -> tuple[float | None, float | None]:
    """Percentiles of the replicates that have a score; none where too few have one, as with a few units."""
    import numpy as np

    defined = replicates[np.isfinite(replicates)]
    if len(defined) < _DEFINED * len(replicates):
        return None, None
    tail = (1 - level) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return round(float(low), 6), round(float(high), 6)


def _verdict(low: float | None, high: float | None, lower_is_better: bool) -> Verdict:
    if low is None or high is None:
        return "no interval"
    if low <= 0 <= high:
        return "within noise"
    return "better" if (low > 0) != lower_is_better else "worse"
