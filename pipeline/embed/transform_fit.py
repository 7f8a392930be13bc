"""Fit a target transform on blocks of vectors, in memory that grows with their width and not with their number.

Everything is float64. Second moments are taken around the mean of the first block: hidden states have a mean that is
large against their spread, which would cost digits. The fit depends on the rows and their order alone.

Kinds (mu and C: mean and covariance of the training targets, C = V diag(lambda) V', variances descending):

- center: x - mu
- standardize: each dimension of x - mu over its standard deviation. `decorrelate` p multiplies by R^(-p/2), with the
  correlations R, scaled so that the mean variance stays 1; p = 1 is ZCA-cor (Kessy, Lewin and Strimmer 2018). R is
  shrunk first, R' = (1 - s) R + s I, by default with the intensity of Schäfer and Strimmer (2005).
- whiten: V' (x - mu) over the square roots of the variances; `components` keeps the leading ones. The covariance is
  shrunk first, C' = (1 - s) C + s tr(C)/d I, by default with the intensity of Ledoit and Wolf (2004).
- remove-components: x - mu without its part along the leading components (Mu and Viswanath 2018)
- rotate: U' x, with the directions U of C + mu mu', of which the first hold most of the squared length. No mean is
  taken away: inner products and cosines stay those of x, and the first dimensions approximate them best.

`rotate: true` turns the vectors that another kind gives by the principal components of these.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from pipeline.core.errors import TeacherError, nested_in
from pipeline.core.target_transform import TargetTransform, TransformParams
from pipeline.core.vectors import principal_components

log = logging.getLogger(__name__)

LEAST_ROWS = 2
# Variance of equal rows after rounding, as a share of the mean's squared length.
EQUAL = 1e-28
# Share of the variance that may be removed without a warning.
MOST_REMOVED = 0.9


class TargetMoments:
    """Running sums over vectors `[N, d]` for their mean, covariance and shrinkage."""

    def __init__(self) -> None:
        self.rows = 0
        self._origin = self._sum = self._scatter = self._weighted = np.empty(0)
        self._fourth = 0.0

    def add(self, vectors: np.ndarray) -> None:
        """Add a block `[B, d]`."""
        block = vectors.astype(np.float64)
        if not len(block):
            return
        if not self.rows:
            width = block.shape[1]
            self._origin = block.mean(0)
            self._sum, self._weighted, self._scatter = np.zeros(width), np.zeros(width), np.zeros((width, width))
        moved = block - self._origin
        squares = np.einsum("ij,ij->i", moved, moved)
        self.rows += len(moved)
        self._sum += moved.sum(0)
        self._scatter += moved.T @ moved
        self._weighted += squares @ moved
        self._fourth += float(squares @ squares)

    @property
    def mean(self) -> np.ndarray:
        """`[d]`."""
        return self._origin + self._offset

    def covariance(self) -> np.ndarray:
        """`[d, d]`, over N."""
        return self._scatter / self.rows - np.outer(self._offset, self._offset)

    def shrinkage(self, covariance: np.ndarray) -> float:
        """The intensity of Ledoit and Wolf, 0 to 1, for the covariance `[d, d]` of these rows."""
        width, level = len(covariance), np.trace(covariance) / len(covariance)
        squared = float(np.square(covariance).sum())
        away = squared - width * level**2
        noise = (self._centred_fourth() - squared) / self.rows
        return float(np.clip(noise / away, 0.0, 1.0)) if away > 0 else 0.0

    def _centred_fourth(self) -> float:
        """Mean of the fourth powers of the distances from the mean."""
        offset, mean_square = self._offset, np.trace(self._scatter) / self.rows
        length = float(offset @ offset)
        # |z - o|^4 = (|z|^2 - 2 o.z + |o|^2)^2, summed term by term.
        along = float(offset @ self._scatter @ offset) / self.rows
        weighted = float(offset @ self._weighted) / self.rows
        return (
            self._fourth / self.rows + 4 * along + length**2 - 4 * weighted + 2 * length * mean_square - 4 * length**2
        )

    @property
    def _offset(self) -> np.ndarray:
        return self._sum / self.rows


class Fitted(NamedTuple):
    """A transform, and the facts of its fit for results/."""

    transform: TargetTransform
    facts: dict[str, Any]


def fit_transform(params: TransformParams, blocks: Iterable[np.ndarray], *, unit_length: bool) -> Fitted:
    """The transform of the params (of any kind but none; auto is fitted as standardize), fitted on vectors.

    Args:
        params: section `embed.transform`.
        blocks: vectors `[B, d]` in a fixed order, of length 1 already if `unit_length`.
        unit_length: see `TargetTransform`.

    Raises:
        TeacherError: too few vectors, or all are equal, or too few dimensions or directions for `components`.
    """
    moments = TargetMoments()
    for block in blocks:
        moments.add(block)
    with nested_in("transform"):
        _check(params, moments)
        if params.kind == "auto":
            params = TransformParams(kind="standardize")
        facts: dict[str, Any] = {"kind": params.kind, "fitted_rows": moments.rows}
        forward, inverse = _maps(params, moments, facts)
        if params.rotate:
            forward, inverse = _rotated(forward, inverse, moments.covariance(), facts)
    subtracted = np.zeros_like(moments.mean) if params.kind == "rotate" else moments.mean
    mean, forward, inverse = (value.astype(np.float32) for value in (subtracted, forward, inverse))
    kind = f"{params.kind}, rotated" if params.rotate else params.kind
    return Fitted(TargetTransform(kind, unit_length, mean, forward, inverse), facts)


def _check(params: TransformParams, moments: TargetMoments) -> None:
    if moments.rows < LEAST_ROWS:
        message = f"{params.kind} is fitted on training responses, at least {LEAST_ROWS}: there are {moments.rows}"
        raise TeacherError(message, argument="kind")
    if not np.trace(moments.covariance()) > EQUAL * float(np.square(moments.mean).sum()):
        raise TeacherError(f"{params.kind}: the teacher embeds all training responses alike", argument="kind")
    width = len(moments.mean)
    most = width - 1 if params.kind == "remove-components" else width
    if params.components is not None and params.components > most:
        raise TeacherError(f"{params.components}: at most {most} of {width} dimensions", argument="components")


def _maps(params: TransformParams, moments: TargetMoments, facts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Forward and inverse."""
    covariance = moments.covariance()
    if params.kind == "center":
        return np.ones(len(moments.mean)), np.ones(len(moments.mean))
    if params.kind == "standardize":
        return _standardized(params, covariance, moments.rows, facts)
    if params.kind == "rotate":
        nothing = np.ones(len(moments.mean))
        return _rotated(nothing, nothing, covariance + np.outer(moments.mean, moments.mean), facts)
    variances, directions = principal_components(covariance)
    if params.kind == "whiten":
        share = _shrinkage(params, lambda: moments.shrinkage(covariance), moments.rows, facts)
        count = params.components or len(variances)
        facts["kept_variance"] = _part(variances, count)
        shrunk = (1 - share) * variances + share * variances.mean()
        forward, inverse = _inverse_roots(shrunk[:count], params.epsilon, facts)
        return directions[:, :count] * forward, (directions[:, :count] * inverse).T
    _check_rank(params, moments.rows, variances)
    removed = directions[:, : params.components]
    share = facts["removed_variance"] = _part(variances, params.components)
    if share > MOST_REMOVED:
        removes = "components (%s) removes %.1f %% of the variance of the targets: fewer may be better"
        log.warning(removes, params.components, 100 * share)
    return np.eye(len(removed)) - removed @ removed.T, np.ones(len(removed))


def _standardized(
    params: TransformParams, covariance: np.ndarray, rows: int, facts: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Forward and inverse, `[d]` each, or `[d, d]` with `decorrelate`."""
    forward, inverse = _inverse_roots(np.diag(covariance).clip(0), params.epsilon, facts)
    if not params.decorrelate:
        return forward, inverse
    correlations = covariance * np.outer(forward, forward)
    share = _shrinkage(params, lambda: correlation_shrinkage(correlations, rows), rows, facts)
    shrunk = (1 - share) * correlations + share * np.diag(forward > 0)
    variances, directions = principal_components(shrunk)
    shrink, grow = (roots**params.decorrelate for roots in _inverse_roots(variances, params.epsilon, facts))
    before = ((correlations @ directions) * directions).sum(0)
    scale = (np.count_nonzero(forward) / float(before @ shrink**2)) ** 0.5
    return (
        forward[:, None] * (directions * (scale * shrink)) @ directions.T,
        (directions * (grow / scale)) @ directions.T * inverse,
    )


def _shrinkage(params: TransformParams, estimate: Callable[[], float], rows: int, facts: dict[str, Any]) -> float:
    """What the params say, or the estimate; it is among the facts."""
    share = params.shrinkage
    if share == "auto":
        share = estimate()
        log.info("shrinkage: %.4g (auto, for %d responses)", share, rows)
    facts["shrinkage"] = round(share, 6)
    return share


def correlation_shrinkage(correlations: np.ndarray, rows: int) -> float:
    """The intensity of Schäfer and Strimmer (2005), 0 to 1: noise of the correlations `[d, d]` over their squares.

    Their variances are those of normally distributed rows, (1 - r^2)^2 / (N - 1).
    """
    squares = np.square(correlations[~np.eye(len(correlations), dtype=bool)])
    squares = squares[squares > 0]
    if not squares.size:
        return 1.0
    return float(min(1.0, np.square(1 - squares).sum() / (rows - 1) / squares.sum()))


def _rotated(
    forward: np.ndarray, inverse: np.ndarray, moments: np.ndarray, facts: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """A map and its inverse followed by a rotation; `moments` `[d, d]` are the second moments before the map."""
    forward, inverse = (np.diag(part) if part.ndim == 1 else part for part in (forward, inverse))
    variances, directions = principal_components(forward.T @ moments @ forward)
    width = len(variances)
    facts["leading"] = {str(width // part): _part(variances, width // part) for part in (8, 4, 2) if width >= part}
    return forward @ directions, directions.T @ inverse


def _check_rank(params: TransformParams, rows: int, variances: np.ndarray) -> None:
    """Raises TeacherError if nothing would remain: N rows span at most N - 1 directions."""
    alive = variances > variances[0] * _rounding(variances)
    rank = min(int(alive.sum()), rows - 1)
    if params.components is not None and params.components >= rank:
        raise TeacherError(
            f"{params.components}: the {rows} training responses differ in {rank} directions, without which all "
            f"targets are equal: at most {rank - 1}, or more responses",
            argument="components",
        )


def _rounding(variances: np.ndarray) -> float:
    """Share of the largest variance that an eigenvalue of 0 may have."""
    return len(variances) * float(np.finfo(np.float64).eps)


def _part(variances: np.ndarray, leading: int | None) -> float:
    return round(float(variances[:leading].sum() / variances.sum()), 6)


def _inverse_roots(variances: np.ndarray, epsilon: float, facts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """1 over the standard deviations, and the standard deviations; both 0 where the variance is below `epsilon`.

    What is below rounding is 0 at any `epsilon`: of fewer rows than dimensions some directions do not vary.
    """
    epsilon = max(epsilon, _rounding(variances))
    alive = variances > epsilon * variances.max()
    facts["left_out"] = int((~alive).sum())
    if facts["left_out"]:
        message = "%d of %d directions have less than epsilon (%g) of the largest variance and are left at 0"
        log.warning(message, facts["left_out"], len(variances), epsilon)
    roots = np.sqrt(variances) * alive
    return np.divide(1.0, roots, out=np.zeros_like(roots), where=alive), roots
