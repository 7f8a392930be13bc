"""How many steps there are, and the learning rate of each."""

import math
from typing import Literal

from pipeline.training.params import TrainParams

Shape = Literal["constant", "linear", "cosine"]


def rate_factor(step: int, warmup: int, total: int, shape: Shape = "linear") -> float:
    """Linear warm-up to 1 over `warmup` steps, then constant, or down to 0 at `total`, straight or as half a cosine.

    Args:
        step: counts from 0.
        warmup: steps.
        total: steps.
        shape: of the way after the warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    if shape == "constant":
        return 1.0
    left = min(1.0, max(0.0, (total - step) / max(1, total - warmup)))
    return left if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def planned_steps(rows: int, params: TrainParams) -> int:
    """Optimiser steps that the params ask for."""
    steps = math.ceil(rows / params.batch_size) * params.epochs
    return min(steps, params.stop_after_steps) if params.stop_after_steps else steps
