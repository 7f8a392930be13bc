"""The closed-form start with its rows shared among processes, run by test_warm_start.py in one and in several.

python -m tests.train.shared_start_run OUT     OUT: what the first process ended with
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.encoder.student import Student
from pipeline.parallel.ranks import rank_process
from pipeline.train.data import TrainingRows
from pipeline.train.states import RowPasses
from pipeline.train.warm_start import Statistics, accumulate, warm_start

ROWS, TOKENS, HIDDEN, WIDTH = 403, 2, 6, 5


Ids = Sequence[Sequence[int]]


class RowByRow:
    """Hidden states of a query that depend on nothing but its tokens, whatever it is read with."""

    padded = False
    _table = np.random.default_rng(1).normal(2.0, 1.0, (50, TOKENS, HIDDEN)).astype(np.float32)

    def __call__(
        self, query_ids: Sequence[Sequence[int]], tokens: torch.Tensor, read: int, _: Any = None
    ) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.tanh(self._table[list(ids)].sum(0) / 7) for ids in query_ids]))


def some_rows() -> TrainingRows:
    generator = np.random.default_rng(0)
    queries = [generator.integers(0, 50, generator.integers(1, 9)).tolist() for _ in range(ROWS)]
    hidden = RowByRow()(queries, torch.zeros(0), TOKENS).numpy().mean(1)
    targets = hidden @ generator.normal(size=(HIDDEN, WIDTH)) + 0.3 * generator.normal(size=(ROWS, WIDTH))
    return TrainingRows([str(row) for row in range(ROWS)], queries, [[1]] * ROWS, targets.astype(np.float32))


def run(accelerator: Any, rows: int) -> dict[str, np.ndarray]:
    """Sums over the first `rows` and the start that they give, in float64."""
    student = Student(HIDDEN, WIDTH, TOKENS).double()
    passes = RowPasses(student, RowByRow(), accelerator, most_rows=1, most_tokens=40)
    statistics = accumulate(Statistics(TOKENS, HIDDEN), some_rows(), range(rows), passes)
    found = {"rows": np.array(len(statistics)), "means": statistics.position_means}
    found["spread"] = np.array(statistics.spread)
    for number, (moments, features, targets) in enumerate(statistics.folds()):
        parts = vars(moments) | {"features": features, "targets": targets}
        found |= {f"fold {number} {name}": np.array(value) for name, value in parts.items()}
    found["ridge"] = np.array(warm_start(student, statistics, np.ones((TOKENS, HIDDEN)), 2.0, "auto"))
    found |= {name: value.detach().numpy() for name, value in student.named_parameters()}
    return found


if __name__ == "__main__":
    from accelerate import Accelerator

    with rank_process():
        shared = Accelerator()
        # Of three rows one process reads two, and some folds have none.
        both = {f"{rows} {name}": value for rows in (ROWS, 3) for name, value in run(shared, rows).items()}
        if shared.is_main_process:
            np.savez(Path(sys.argv[1]), **both)
