"""Transforms of targets against closed forms: identity covariance, the way back, planted directions, few rows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pipeline.core.errors import TeacherError
from pipeline.core.target_transform import TargetTransform, TransformParams
from pipeline.core.vectors import anisotropy, principal_components
from pipeline.embed.transform_fit import TargetMoments, fit_transform

ROWS, WIDTH = 600, 12


def planted(rows: int = ROWS, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Correlated vectors around a mean that is large beside their spread, with one dominant direction."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / width**0.5
    spread = random.normal(size=(rows, width)) @ mixing
    return (100.0 + spread + 20.0 * random.normal(size=(rows, 1)) * dominant(width)).astype(np.float32)


def dominant(width: int = WIDTH) -> np.ndarray:
    direction = np.where(np.arange(width) % 2, 1.0, -1.0)
    return direction / np.linalg.norm(direction)


def blocks(vectors: np.ndarray, size: int = 100) -> Iterator[np.ndarray]:
    return (vectors[start : start + size] for start in range(0, len(vectors), size))


def fit(vectors: np.ndarray, unit_length: bool = False, size: int = 100, **params: Any) -> TargetTransform:
    return fit_transform(TransformParams(**params), blocks(vectors, size), unit_length=unit_length).transform


def covariance(vectors: np.ndarray) -> np.ndarray:
    return np.cov(vectors.astype(np.float64).T, bias=True)


def test_moments_of_blocks_are_those_of_all_rows() -> None:
    vectors = planted()
    for size in (1, 7, ROWS):
        moments = TargetMoments()
        for block in blocks(vectors, size):
            moments.add(block)
        moments.add(vectors[:0])
        assert moments.rows == ROWS
        np.testing.assert_allclose(moments.mean, vectors.astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance(), covariance(vectors), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [8, 40, 2000])
def test_shrinkage_is_ledoit_and_wolfs(rows: int) -> None:
    from sklearn.covariance import ledoit_wolf_shrinkage

    vectors = planted(rows)
    moments = TargetMoments()
    for block in blocks(vectors, 3):
        moments.add(block)
    expected = ledoit_wolf_shrinkage(vectors.astype(np.float64))
    assert moments.shrinkage(moments.covariance()) == pytest.approx(expected, rel=1e-6)


def test_centred_targets_have_mean_zero() -> None:
    vectors = planted()
    transform = fit(vectors, kind="center")
    mapped = transform(vectors)
    np.testing.assert_allclose(mapped.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(mapped - mapped[:1], vectors - vectors[:1], atol=1e-4)
    assert transform.forward.shape == (WIDTH,)


def test_standardised_targets_have_variance_one() -> None:
    mapped = fit(planted(), kind="standardize")(planted())
    np.testing.assert_allclose(mapped.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(mapped.mean(0), 0, atol=1e-4)


def test_whitened_targets_have_identity_covariance() -> None:
    vectors = planted()
    mapped = fit(vectors, kind="whiten", shrinkage=0.0)(vectors)
    np.testing.assert_allclose(covariance(mapped), np.eye(WIDTH), atol=1e-4)
    # mean over dimensions of the squared error of a zero prediction
    assert np.square(mapped).mean() == pytest.approx(1.0, abs=1e-4)


def test_whitening_keeps_the_leading_components() -> None:
    vectors = planted()
    whole, leading = (fit(vectors, kind="whiten", shrinkage=0.0, components=count)(vectors) for count in (None, 3))
    assert leading.shape == (ROWS, 3)
    np.testing.assert_allclose(leading, whole[:, :3], atol=1e-5)
    along = vectors @ dominant()
    assert abs(np.corrcoef(leading[:, 0], along)[0, 1]) > 0.99


def correlated() -> np.ndarray:
    """20 rows of two dimensions with correlation .6."""
    return np.array([[1, 1], [-1, -1]] * 8 + [[1, -1], [-1, 1]] * 2) * [2, 5] + [3, 7]


@pytest.mark.parametrize(
    ("power", "shrinkage", "expected"),
    [(0.5, 0.0, 1 / 3), (1, 0.0, 0), (1, 0.5, (16 / 13 - 4 / 7) / (16 / 13 + 4 / 7))],
)
def test_dimensions_are_decorrelated_by_a_power(power: float, shrinkage: float, expected: float) -> None:
    # R has the variances 1.6 and .4. At .5 they become 1.265 and .632, whose mean is scaled to 1: 4/3 and 2/3, so 1/3
    # beside the diagonal. Half shrunk, R' has the variances 1.3 and .7, by which 1.6 and .4 are divided.
    rows = correlated()
    transform = fit(rows, kind="standardize", decorrelate=power, shrinkage=shrinkage)
    np.testing.assert_allclose(covariance(transform(rows)), [[1, expected], [expected, 1]], atol=1e-6)
    np.testing.assert_allclose(transform.invert(transform(rows)), rows, atol=1e-5)


def test_correlations_are_shrunk_by_what_is_noise_in_them() -> None:
    # r = .6 from 20 rows has the variance (1 - .36)^2 / 19.
    params = TransformParams(kind="standardize", decorrelate=0.5)
    facts = fit_transform(params, blocks(correlated()), unit_length=False).facts
    assert facts["shrinkage"] == pytest.approx(0.64**2 / 19 / 0.36, abs=1e-6)


def test_independent_dimensions_are_only_standardised() -> None:
    rows = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * [2, 5]
    transform = fit(rows, kind="standardize", decorrelate=1)
    np.testing.assert_allclose(transform(rows), rows / [2, 5], atol=1e-6)


def cosines(vectors: np.ndarray) -> np.ndarray:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def test_a_rotation_keeps_cosines_and_puts_the_longest_directions_first() -> None:
    vectors = planted() - 99
    fitted = fit_transform(TransformParams(kind="rotate"), blocks(vectors), unit_length=False)
    turned = fitted.transform(vectors)
    np.testing.assert_allclose(cosines(turned), cosines(vectors), atol=1e-5)
    squares = np.square(turned.astype(np.float64)).mean(axis=0)
    assert (np.diff(squares) < 1e-4).all()
    # Dimensions of the turned vectors share no second moment.
    moments = turned.T.astype(np.float64) @ turned / ROWS
    np.testing.assert_allclose(moments, np.diag(squares), atol=1e-3)
    assert fitted.facts["leading"] == {
        str(count): pytest.approx(squares[:count].sum() / squares.sum(), abs=1e-5) for count in (1, 3, 6)
    }


def test_the_first_rotated_dimensions_are_the_nearest_to_all_inner_products() -> None:
    vectors = planted() - 100
    products = vectors @ vectors.T
    leading = fit(vectors, kind="rotate")(vectors)[:, :3]
    # Eckart and Young: the error of the best approximation of rank 3 is the tail of the singular values.
    values = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
    error = np.linalg.norm(products - leading @ leading.T)
    assert error == pytest.approx(np.sqrt((values[3:] ** 4).sum()), rel=1e-3)


@pytest.mark.parametrize("kind", ["center", "standardize", "remove-components"])
def test_another_kind_is_rotated_after_it(kind: str) -> None:
    vectors, params = planted(), {"components": 1} if kind == "remove-components" else {}
    alone, rotated = fit(vectors, kind=kind, **params), fit(vectors, kind=kind, rotate=True, **params)
    np.testing.assert_allclose(cosines(rotated(vectors)), cosines(alone(vectors)), atol=1e-4)
    np.testing.assert_allclose(rotated.invert(rotated(vectors)), alone.invert(alone(vectors)), rtol=1e-4, atol=1e-3)
    found = covariance(rotated(vectors))
    np.testing.assert_allclose(found, np.diag(np.diag(found)), atol=1e-3)
    assert (np.diff(np.diag(found)) < 1e-4).all()
    assert rotated.kind == f"{kind}, rotated"


@pytest.mark.parametrize(
    "params",
    [
        {"kind": "center"},
        {"kind": "standardize"},
        {"kind": "whiten"},
        {"kind": "whiten", "shrinkage": 0.3},
        {"kind": "rotate"},
        {"kind": "standardize", "rotate": True},
        {"kind": "standardize", "decorrelate": 0.5},
        {"kind": "standardize", "decorrelate": 0.5, "rotate": True},
    ],
)
@pytest.mark.parametrize("unit_length", [False, True])
def test_there_and_back(params: dict[str, Any], unit_length: bool) -> None:
    vectors = planted()
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if unit_length else vectors
    transform = fit(vectors, unit_length, **params)
    fresh = planted(seed=5)
    scaled = fresh / np.linalg.norm(fresh, axis=1, keepdims=True) if unit_length else fresh
    np.testing.assert_allclose(transform.invert(transform(fresh)), scaled, rtol=1e-4)


def test_a_planted_direction_is_removed_and_comes_back_as_its_mean() -> None:
    vectors = planted()
    transform = fit(vectors, kind="remove-components", components=1)
    [leading] = principal_components(covariance(vectors))[1].T[:1]
    assert abs(leading @ dominant()) > 0.99
    mapped, back = transform(vectors), transform.invert(transform(vectors))
    np.testing.assert_allclose(mapped @ leading, 0, atol=1e-4)
    np.testing.assert_allclose(back @ leading, (vectors @ leading).mean(), rtol=1e-4)
    others = np.eye(WIDTH) - np.outer(leading, leading)
    np.testing.assert_allclose(back @ others, vectors @ others, atol=1e-3)


@pytest.mark.parametrize(
    "params", [{"kind": "center"}, {"kind": "whiten"}, {"kind": "remove-components", "components": 1}]
)
def test_an_anisotropic_set_becomes_isotropic(params: dict[str, Any]) -> None:
    vectors = planted()
    assert anisotropy(vectors) > 0.99
    assert abs(anisotropy(fit(vectors, **params)(vectors))) < 0.01


@pytest.mark.parametrize(
    "params",
    [
        {"kind": "whiten"},
        {"kind": "whiten", "shrinkage": 0.0},
        {"kind": "whiten", "shrinkage": 0.5},
        {"kind": "standardize", "decorrelate": 0.5},
    ],
)
def test_fewer_rows_than_dimensions_work(params: dict[str, Any]) -> None:
    few, fresh = planted(5), planted(50, seed=3)
    transform = fit(few, **params)
    mapped = transform(fresh)
    assert np.isfinite(mapped).all()
    # Directions in which the rows do not vary must not swamp the others: left at 0, or held by the shrinkage.
    assert np.abs(mapped).max() < 100
    np.testing.assert_allclose(transform.invert(transform(few)), few, rtol=1e-3)


def test_a_dimension_without_variance_stays_at_zero_and_comes_back_as_its_mean(
    caplog: pytest.LogCaptureFixture,
) -> None:
    vectors = planted()
    vectors[:, 2] = 7.0
    transform = fit(vectors, kind="standardize")
    assert (transform(vectors)[:, 2] == 0).all()
    decorrelated = fit(vectors, kind="standardize", decorrelate=0.5)(vectors)
    np.testing.assert_allclose(decorrelated[:, 2], 0, atol=1e-12)
    assert decorrelated.var(axis=0).sum() == pytest.approx(WIDTH - 1, rel=1e-4)
    assert (transform.invert(transform(vectors))[:, 2] == 7.0).all()
    assert "1 of 12 directions" in caplog.text


def test_the_fit_depends_on_the_rows_in_order_and_not_on_what_lies_beside_them() -> None:
    vectors = planted()
    assert fit(vectors, kind="whiten").to_bytes() == fit(vectors.copy(), kind="whiten").to_bytes()
    apart = fit(vectors, size=33, kind="whiten")
    np.testing.assert_allclose(apart(vectors), fit(vectors, kind="whiten")(vectors), atol=1e-4)


@pytest.mark.parametrize(
    ("vectors", "params", "message"),
    [
        (planted(1), {"kind": "center"}, "fitted on training responses, at least 2: there are 1"),
        (planted(1), {"kind": "auto"}, "^transform.kind: auto is fitted on .* at least 2: there are 1"),
        (np.ones((9, 3), np.float32), {"kind": "whiten"}, "^transform.kind: .* alike"),
        (np.ones((9, 3), np.float32), {"kind": "auto"}, "^transform.kind: auto: .* alike"),
        (planted(), {"kind": "whiten", "components": 13}, r"^transform.components: 13: at most 12 of 12 dimensions"),
        (planted(), {"kind": "remove-components", "components": 12}, r"components: 12: at most 11 of 12"),
        (np.full((9, 3), 0.1, np.float32), {"kind": "center"}, "^transform.kind: .* alike"),
        (
            planted(5),
            {"kind": "remove-components", "components": 4},
            "components: 4: the 5 training responses differ in 4 directions, .* at most 3",
        ),
        (
            planted(50) @ np.diag([1, 1, 1, *[0] * (WIDTH - 3)]).astype(np.float32),
            {"kind": "remove-components", "components": 3},
            "components: 3: the 50 training responses differ in 3 directions",
        ),
    ],
)
def test_what_cannot_be_fitted(vectors: np.ndarray, params: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        fit(vectors, **params)


def test_removing_most_of_the_variance_warns(caplog: pytest.LogCaptureFixture) -> None:
    vectors = planted()
    facts = fit_transform(TransformParams(kind="remove-components", components=11), [vectors], unit_length=False).facts
    assert facts["removed_variance"] > 0.9
    assert "components (11) removes" in caplog.text
    caplog.clear()
    flat = np.random.default_rng(0).standard_normal((200, WIDTH)).astype(np.float32)
    fit(flat, kind="remove-components", components=1)
    assert not caplog.text


@pytest.mark.parametrize("params", [{"kind": "whiten"}, {"kind": "standardize", "decorrelate": 1.0}])
def test_epsilon_0_leaves_out_what_is_rounding(params: dict[str, Any]) -> None:
    """Three rows of four dimensions differ in two directions; in the other two they differ by rounding alone."""
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    found = fit_transform(TransformParams(**params, epsilon=0.0, shrinkage=0.0), [rows], unit_length=False)
    assert found.facts["left_out"] == 2
    # Decorrelated rows of a simplex are equally long, and their squares sum up to 3 rows times 2 directions, which
    # standardize scales to 4 dimensions of variance 1.
    squares = 2.0 if params["kind"] == "whiten" else 4.0
    np.testing.assert_allclose(np.square(found.transform(rows)).sum(1), squares, rtol=1e-3)
    assert np.abs(found.transform(rows + 10)).max() < 1e3
