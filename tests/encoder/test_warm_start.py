"""The closed-form start solves the problem it says it solves."""

import numpy as np
import torch

from pipeline.encoder.student import Student
from pipeline.encoder.warm_start import fit_ridge, warm_start


def linear_problem(rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    hidden = generator.normal(3.0, 2.0, (rows, 4, 6)).astype(np.float32)
    weight = generator.normal(size=(5, 6))
    return hidden, (hidden.mean(1) @ weight.T + 0.7).astype(np.float32)


def test_fit_ridge_recovers_a_linear_map() -> None:
    hidden, targets = linear_problem()
    fitted = fit_ridge(hidden.mean(1), targets, "auto")
    np.testing.assert_allclose(hidden.mean(1) @ fitted.weight.T + fitted.bias, targets, atol=0.05)


def test_fit_ridge_of_infinite_strength_is_the_mean() -> None:
    hidden, targets = linear_problem()
    fitted = fit_ridge(hidden.mean(1), targets, 1e12)
    np.testing.assert_allclose(
        hidden.mean(1) @ fitted.weight.T + fitted.bias, targets.mean(0)[None].repeat(200, 0), atol=1e-4
    )


def test_auto_prefers_strong_ridge_for_noise() -> None:
    generator = np.random.default_rng(1)
    noise = fit_ridge(generator.normal(size=(60, 40)), generator.normal(size=(60, 3)), "auto")
    signal = fit_ridge(*(lambda hidden, targets: (hidden.mean(1), targets))(*linear_problem()), "auto")
    assert noise.ridge > 50 * signal.ridge


def test_warm_start_scales_soft_prompts_and_keeps_the_embedding() -> None:
    hidden, targets = linear_problem()
    student = Student(hidden=6, width=5, compression_tokens=4)
    warm_start(student, hidden, targets, input_norm=0.25, strength="auto")
    with torch.no_grad():
        soft = student.soft_prompts(torch.from_numpy(hidden))
    assert abs(float(soft.norm(dim=-1).mean()) - 0.25) < 1e-4
    np.testing.assert_allclose(student.embedding(soft).detach().numpy(), targets, atol=0.05)
