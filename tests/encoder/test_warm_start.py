"""The closed-form start solves the problem it says it solves."""

import numpy as np
import torch

from pipeline.encoder.student import Student
from pipeline.encoder.warm_start import choose_strength, fit_ridge, reciprocal_rank, warm_start


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


def test_warm_start_places_soft_prompts_and_keeps_the_embedding() -> None:
    hidden, targets = linear_problem()
    words = np.random.default_rng(2).normal(0.1, 1.0, (50, 6)).astype(np.float32)
    student = Student(hidden=6, width=5, compression_tokens=4)
    warm_start(student, hidden, targets, words, strength=1e-6)
    with torch.no_grad():
        soft = student.soft_prompts(torch.from_numpy(hidden))
        embeddings = student.embedding(soft).numpy()
    np.testing.assert_allclose(soft.mean((0, 1)).numpy(), words.mean(0), atol=1e-5)
    spread = np.linalg.norm(soft.numpy() - words.mean(0), axis=-1).mean()
    np.testing.assert_allclose(spread, 0.25 * np.linalg.norm(words, axis=-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(embeddings, targets, atol=1e-3)
