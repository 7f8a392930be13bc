"""The embedding with a share of the predicted response, on maps that are known."""

import numpy as np
import pytest

from pipeline.core.errors import EvaluationError
from pipeline.core.vectors import unit_rows
from pipeline.evaluate.standardized import fit_standardization
from pipeline.readings.closed_form import Prediction, fit_prediction
from pipeline.train.ridge import LinearMap


def test_standardised_rows_have_mean_0_and_deviation_1() -> None:
    rows = np.array([[1.0, 10.0], [3.0, 50.0]])
    np.testing.assert_allclose(fit_standardization(rows)(rows), [[-1, -1], [1, 1]])
    with pytest.raises(EvaluationError, match="alike"):
        fit_standardization(np.ones((3, 2)))


def test_a_linear_map_is_found_again() -> None:
    rng = np.random.default_rng(0)
    readings, weight = rng.normal(size=(2000, 6)), rng.normal(size=(4, 6))
    targets = readings @ weight.T + 3
    fitted = fit_prediction(readings, targets)
    assert fitted.ridge == 10.0  # nothing is gained by a stronger one
    np.testing.assert_allclose(fitted.map(readings), targets, atol=0.1)
    np.testing.assert_allclose(fitted.target_length, np.linalg.norm(targets, axis=1).mean())
    np.testing.assert_allclose(fitted.reading_length, np.linalg.norm(readings, axis=1).mean())


# Doubles the first dimension: predictions of mean length 4, readings of mean length 2, targets of mean length 8.
KNOWN = Prediction(LinearMap(np.array([[2.0, 0.0]]), np.zeros(1)), 10.0, 4.0, 2.0, 8.0)


def test_prediction_and_reading_stand_side_by_side_at_the_mean_length_of_readings() -> None:
    readings = np.array([[2.0, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(KNOWN.embed(readings, 0.25), [[0.25 * 2, 0.75 * 2, 0], [0, 0, 0.75 * 2]])
    np.testing.assert_allclose(KNOWN.answers(np.array([[8.0]]), readings[1:], 0.25), [[0.25 * 2, 0, 0.75 * 2]])


def test_share_1_is_the_prediction_alone_and_a_small_share_nearly_the_reading() -> None:
    readings = np.array([[2.0, 1.0], [-1.0, 2.0]])
    np.testing.assert_allclose(KNOWN.embed(readings, 1.0), [[2.0], [-1.0]])
    assert KNOWN.answers(np.array([[8.0]]), readings[:1], 1.0).shape == (1, 1)
    nearly = unit_rows(KNOWN.embed(readings, 1e-6))
    np.testing.assert_allclose(nearly[:, 1:], unit_rows(readings), atol=1e-5)


def test_the_digest_follows_the_numbers() -> None:
    other = Prediction(LinearMap(np.array([[2.0, 0.1]]), np.zeros(1)), 10.0, 4.0, 2.0, 8.0)
    assert KNOWN.digest != other.digest
    assert KNOWN.digest == Prediction(KNOWN.map, 10.0, 4.0, 2.0, 8.0).digest


def test_a_reading_is_mapped_by_the_queries_own_embeddings_before_it_is_added() -> None:
    readings = np.array([[1.0], [-1.0]] * 5)
    predicted, own = 4 * readings + 8, 2 * readings + 7
    fitted = fit_prediction(readings, predicted, "added", own)
    # Ridge 10 over ten rows of length 1 halves the slopes: 2 r + 8 and r + 7, of mean lengths 8 and 7.
    assert (fitted.ridge, fitted.length, fitted.reading_length, fitted.target_length) == (10, 8, 7, 8)
    np.testing.assert_allclose(fitted.embed(np.array([[1.0]]), 0.25), [[0.25 * 10 * 7 / 8 + 0.75 * 8]])
    np.testing.assert_allclose(
        fitted.answers(np.array([[16.0]]), np.array([[-1.0]]), 0.25), [[0.25 * 2 * 7 + 0.75 * 6]]
    )
    assert fitted.digest != fit_prediction(readings, predicted, "added", own + 1).digest
