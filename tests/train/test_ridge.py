"""Sums of any batches give the ridge regression of all rows."""

import numpy as np
import pytest

from pipeline.train.ridge import LinearMap, Moments, fit_ridge


def linear_problem(rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    features = generator.normal(3.0, 2.0, (rows, 6))
    return features, features @ generator.normal(size=(6, 5)) + 0.7


def assert_equal(first: Moments, second: Moments, relative: float = 1e-12) -> None:
    assert first.count == second.count
    for name in ("mean", "target_mean", "scatter", "cross"):
        expected = getattr(second, name)
        np.testing.assert_allclose(getattr(first, name), expected, rtol=0, atol=relative * np.abs(expected).max())


def test_fit_ridge_recovers_a_linear_map() -> None:
    features, targets = linear_problem()
    [fitted] = fit_ridge(Moments.of(features, targets), [1e-9])
    np.testing.assert_allclose(fitted(features), targets, atol=1e-8)


def test_fit_ridge_equals_the_definition() -> None:
    """(Z'Z + s I)^-1 Z'y on standardised features."""
    features, targets = linear_problem()
    standardised = (features - features.mean(0)) / features.std(0)
    expected = np.linalg.solve(
        standardised.T @ standardised + 7.0 * np.eye(6), standardised.T @ (targets - targets.mean(0))
    )
    _, fitted = fit_ridge(Moments.of(features, targets), [1.0, 7.0])
    np.testing.assert_allclose(fitted(features), standardised @ expected + targets.mean(0), atol=1e-7)


def test_fit_ridge_of_infinite_strength_is_the_mean() -> None:
    features, targets = linear_problem()
    [fitted] = fit_ridge(Moments.of(features, targets), [1e12])
    np.testing.assert_allclose(fitted(features), targets.mean(0)[None].repeat(200, 0), atol=1e-7)


def test_strength_0_over_fewer_rows_than_features_is_the_smallest_map_that_fits() -> None:
    features, targets = linear_problem(4)
    standardised = (features - features.mean(0)) / features.std(0)
    expected = np.linalg.pinv(standardised) @ (targets - targets.mean(0))
    [fitted] = fit_ridge(Moments.of(features, targets), [0.0])
    np.testing.assert_allclose(fitted(features), targets, atol=1e-9)
    np.testing.assert_allclose(fitted.weight.T * features.std(0)[:, None], expected, atol=1e-9)


def test_a_feature_that_never_varies_is_ignored() -> None:
    features, targets = linear_problem()
    features[:, 2] = 5.0
    [fitted] = fit_ridge(Moments.of(features, targets), [1.0])
    assert np.abs(fitted.weight[:, 2]).max() < 1e-6


@pytest.mark.parametrize("cut", [1, 77, 199])
def test_parts_add_up(cut: int) -> None:
    features, targets = linear_problem()
    parts = Moments.of(features[:cut], targets[:cut]) + Moments.of(features[cut:], targets[cut:])
    assert_equal(parts, Moments.of(features, targets))


def test_adding_keeps_the_digits_of_a_large_mean() -> None:
    """A mean a million times the spread: sums of raw squares in float64 would keep four digits of the scatter."""
    features, targets = linear_problem()
    shifted = features + 2e6
    parts = Moments.of(shifted[:50], targets[:50]) + Moments.of(shifted[50:], targets[50:])
    exact = Moments.of(features, targets)
    np.testing.assert_allclose(parts.scatter, exact.scatter, atol=1e-8 * np.abs(exact.scatter).max())


def test_mapped_sums_are_the_sums_of_mapped_rows() -> None:
    features, targets = linear_problem()
    generator = np.random.default_rng(3)
    by = LinearMap(generator.normal(size=(4, 6)), generator.normal(size=4))
    assert_equal(Moments.of(features, targets).mapped(by), Moments.of(by(features), targets))
