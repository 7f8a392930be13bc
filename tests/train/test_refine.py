"""The refinement: the loss against its formula, and a closed form that retrieves badly made to retrieve well."""

import math

import numpy as np
import pytest
import torch

from pipeline.core.vectors import rank_own, unit_rows
from pipeline.train.params import RefineParams
from pipeline.train.refine import info_nce, refine
from pipeline.train.ridge import LinearMap, Moments, fit_ridge


def test_the_loss_is_the_formula() -> None:
    predicted = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    first = -math.log(math.exp(2) / (math.exp(2) + math.exp(0)))
    second = -math.log(math.exp(1.6) / (math.exp(1.2) + math.exp(1.6)))
    assert info_nce(predicted, targets, 0.5, 1.0).item() == pytest.approx((first + second) / 2, abs=1e-6)


def test_near_duplicates_are_no_negatives() -> None:
    targets = torch.tensor([[1.0, 0.0], [0.96, 0.28], [0.0, 1.0]])
    masked = info_nce(targets, targets, 1.0, 0.9)
    apart = -math.log(math.e / (math.e + 1))
    assert masked.item() == pytest.approx(
        (apart - math.log(math.e / (math.e + math.exp(0.28))) - math.log(math.e / (math.e + 1 + math.exp(0.28)))) / 3,
        abs=1e-6,
    )
    assert masked < info_nce(targets, targets, 1.0, 1.0)


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Features that hold the targets' small directions next to noise; large directions say little about a row."""
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(600, 12)) * np.array([4.0] * 2 + [0.5] * 10) + 1
    features = np.hstack([targets + rng.normal(size=targets.shape) * 0.6, rng.normal(size=(600, 8))]) * 3 + 7
    return features, targets


def closed(features: np.ndarray, targets: np.ndarray) -> LinearMap:
    [fitted] = fit_ridge(Moments.of(features, targets), [300.0])
    return fitted


PARAMS = RefineParams(steps=60, batch_size=256, pull=0.1)


def test_more_rows_find_their_own_target(rows: tuple[np.ndarray, np.ndarray]) -> None:
    features, targets = rows
    start = closed(features[:400], targets[:400])
    refined = refine(start, features[:400], targets[:400], PARAMS, seed=0)
    before, after = (rank_own(fitted(features[400:]), targets[400:]).mrr for fitted in (start, refined))
    assert after > before + 0.02
    lengths = [np.linalg.norm(fitted(features[:400]), axis=1).mean() for fitted in (start, refined)]
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-4)


def test_a_strong_pull_stays_at_the_closed_form(rows: tuple[np.ndarray, np.ndarray]) -> None:
    features, targets = rows
    start = closed(features, targets)

    def moved(pull: float) -> float:
        refined = refine(start, features, targets, PARAMS.model_copy(update={"pull": pull}), seed=0)
        return float(1 - (unit_rows(refined(features)) * unit_rows(start(features))).sum(1).mean())

    assert moved(1000.0) < 0.1 * moved(0.0)


def test_a_seed_decides_all(rows: tuple[np.ndarray, np.ndarray]) -> None:
    start = closed(*rows)
    params = PARAMS.model_copy(update={"steps": 3})
    one, again, other = (refine(start, *rows, params, seed=seed).weight for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
