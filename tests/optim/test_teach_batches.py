"""The rows of a step are a function of the seed and the step."""

from collections import Counter

import numpy as np
import pytest

from pipeline.optim.batching import Batches, parts

LENGTHS = np.random.default_rng(0).integers(1, 100, 103).tolist()


@pytest.mark.parametrize("grouping", [1, 4])
def test_every_row_once_an_epoch_but_for_what_fills_no_batch(grouping: int) -> None:
    batches = Batches(LENGTHS, 10, seed=1, grouping=grouping)
    for epoch in range(3):
        seen = Counter(row for step in range(10) for row in batches.at(10 * epoch + step))
        assert len(seen) == 100
        assert set(seen.values()) == {1}
    left_out = [set(range(103)) - {row for step in range(10) for row in batches.at(10 * e + step)} for e in range(3)]
    assert len(set.intersection(*left_out)) == 0


@pytest.mark.parametrize("grouping", [1, 4])
def test_a_step_needs_none_before_it(grouping: int) -> None:
    whole = Batches(LENGTHS, 10, seed=1, grouping=grouping)
    taken = [whole.at(step) for step in range(25)]
    assert Batches(LENGTHS, 10, seed=1, grouping=grouping).at(17) == taken[17]
    assert Batches(LENGTHS, 10, seed=2, grouping=grouping).at(17) != taken[17]
    assert all(
        [LENGTHS[row] for row in batch] == sorted((LENGTHS[row] for row in batch), reverse=True) for batch in taken
    )


def test_grouping_saves_padding() -> None:
    def padding(grouping: int) -> int:
        batches = Batches(LENGTHS, 10, seed=1, grouping=grouping)
        return sum(10 * LENGTHS[batch[0]] - sum(LENGTHS[row] for row in batch) for batch in map(batches.at, range(10)))

    assert padding(5) < 0.5 * padding(1)


def test_parts_keep_the_order() -> None:
    assert parts([5, 3, 1, 4, 2], 2) == [[5, 3], [1, 4], [2]]
