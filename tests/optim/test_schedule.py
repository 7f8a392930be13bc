"""Learning rates and numbers of steps."""

import pytest

from pipeline.optim.schedule import rate_factor
from pipeline.train.params import TrainParams, planned_steps
from tests.train.test_trainer import PARAMS


def test_rate_rises_linearly_then_falls_to_zero() -> None:
    assert [rate_factor(step, 2, 6) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rate_factor(0, 0, 4) == 1.0
    assert rate_factor(9, 2, 6) == 0.0


def test_cosine_falls_slowly_first() -> None:
    factors = [rate_factor(step, 2, 6, "cosine") for step in range(8)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0, 0.0])


def test_constant_stays_after_the_warm_up() -> None:
    assert [rate_factor(step, 2, 4, "constant") for step in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_planned_steps() -> None:
    params = TrainParams(**{**PARAMS, "epochs": 2, "batch_size": 5})
    assert planned_steps(12, params) == 6
    assert planned_steps(12, params.model_copy(update={"stop_after_steps": 4})) == 4
