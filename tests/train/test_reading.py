"""The reading of a trainer's student, of rows with and without variation."""

from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from pipeline.core.target_transform import DECORRELATE
from pipeline.encoder.student import Student
from pipeline.train.reading import reading_of


@pytest.mark.parametrize("rows", [1, 3])
def test_readings_that_are_all_alike_are_not_decorrelated(rows: int) -> None:
    trainer: Any = MagicMock(student=Student(hidden=4, width=2, compression_tokens=1), reading_transform=DECORRELATE)
    alike = reading_of(trainer, np.ones((rows, 4), np.float32))
    assert alike.weight is None and not alike.scale.any()
    varied = reading_of(trainer, np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    assert varied.weight is not None and list(varied.weight.shape) == [4, 4]
