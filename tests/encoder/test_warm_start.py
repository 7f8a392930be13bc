"""The closed-form start solves the problem it says it solves."""

import numpy as np
import pytest
import torch

from pipeline.encoder.student import Student
from pipeline.encoder.warm_start import (
    choose_strength,
    fit_reconstruction,
    fit_ridge,
    frame_rows,
    reciprocal_rank,
    warm_start,
)


def linear_problem(rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    hidden = generator.normal(3.0, 2.0, (rows, 4, 6)).astype(np.float32)
    weight = generator.normal(size=(5, 6))
    return hidden, (hidden.mean(1) @ weight.T + 0.7).astype(np.float32)


def test_fit_ridge_recovers_a_linear_map() -> None:
    hidden, targets = linear_problem()
    [fitted] = fit_ridge(hidden.mean(1), targets, [1e-6])
    np.testing.assert_allclose(fitted(hidden.mean(1)), targets, atol=1e-3)


def test_fit_ridge_equals_the_definition() -> None:
    """(Z'Z + s I)^-1 Z'y on standardised features."""
    hidden, targets = linear_problem()
    features = hidden.mean(1).astype(np.float64)
    standardised = (features - features.mean(0)) / features.std(0)
    expected = np.linalg.solve(
        standardised.T @ standardised + 7.0 * np.eye(6), standardised.T @ (targets - targets.mean(0))
    )
    _, fitted = fit_ridge(features, targets, [1.0, 7.0])
    np.testing.assert_allclose(fitted(features), standardised @ expected + targets.mean(0), atol=1e-5)


def test_fit_ridge_of_infinite_strength_is_the_mean() -> None:
    hidden, targets = linear_problem()
    [fitted] = fit_ridge(hidden.mean(1), targets, [1e12])
    np.testing.assert_allclose(fitted(hidden.mean(1)), targets.mean(0)[None].repeat(200, 0), atol=1e-4)


def test_strength_follows_the_noise() -> None:
    generator = np.random.default_rng(1)
    features = generator.normal(size=(100, 80))
    signal = features @ generator.normal(size=(80, 6))
    noisy = signal + 12.0 * generator.normal(size=signal.shape)
    assert choose_strength(features, noisy) > choose_strength(features, signal)


def test_reciprocal_rank_by_hand() -> None:
    targets = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert reciprocal_rank(targets, targets) == 1.0
    assert reciprocal_rank(targets[::-1], targets) == 0.5


def test_frame_rows_are_the_end_of_the_prompt() -> None:
    words = np.arange(8.0).reshape(4, 2)
    assert frame_rows(words, [0, 3, 1], 2).tolist() == [[6, 7], [2, 3]]
    assert frame_rows(words, [3], 2).tolist() == [[3, 4], [6, 7]]
    assert frame_rows(words, [], 2).tolist() == [[3, 4], [3, 4]]


@pytest.mark.parametrize("tokens", [1, 4])
def test_warm_start_begins_at_the_frame_and_keeps_the_embedding(tokens: int) -> None:
    hidden, targets = linear_problem()
    hidden = hidden[:, :tokens] if tokens > 1 else hidden.mean(1, keepdims=True)
    hidden = hidden + np.arange(tokens, dtype=np.float32)[:, None] * np.linspace(-1, 1, 6, dtype=np.float32) ** 2
    frame = np.random.default_rng(2).normal(0.1, 1.0, (tokens, 6)).astype(np.float32)
    student = Student(hidden=6, width=5, compression_tokens=tokens)
    warm_start(student, hidden, targets, frame, input_norm=2.0, strength=1e-6)
    with torch.no_grad():
        soft = student.soft_prompts(torch.from_numpy(hidden))
        embeddings = student.embedding(soft).numpy()
    np.testing.assert_allclose(soft.mean(0).numpy(), frame, atol=1e-4)
    np.testing.assert_allclose(embeddings, targets, atol=1e-2)


def test_one_token_varies_by_half_the_norm() -> None:
    hidden, _ = linear_problem()
    fitted = fit_reconstruction(hidden[:, :1], np.zeros((1, 6)), input_norm=3.0)
    np.testing.assert_allclose(np.linalg.norm(fitted(hidden[:, 0]), axis=-1).mean(), 1.5, rtol=1e-5)
