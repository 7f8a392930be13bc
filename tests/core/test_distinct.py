"""Different numbers are counted exactly, in memory and beyond it."""

import random

import pytest

from pipeline.core import distinct
from pipeline.core.distinct import Distinct


def test_numbers_are_counted_once() -> None:
    numbers = Distinct()
    assert numbers.count == 0
    numbers.add([3, -7, 3])
    numbers.add([])
    numbers.add([2**63 - 1, -(2**63), -7])
    assert (numbers.added, numbers.count) == (6, 4)


@pytest.mark.parametrize("held", [1, 7, 10_000])
def test_what_does_not_fit_into_memory_is_counted_too(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(distinct, "HELD", held)
    draw = random.Random(0)
    pool = [draw.randrange(-(2**63), 2**63) for _ in range(60)]
    drawn = [draw.choice(pool) for _ in range(200)]
    numbers = Distinct()
    for start in range(0, 200, 20):
        numbers.add(drawn[start : start + 20])
        assert numbers.count == len(set(drawn[: start + 20]))  # counting in between changes nothing
    assert numbers.added == 200
