"""Steps cover every row, forward passes keep to their budget, processes get like shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.optim.batching import BATCH_TOKENS, deal, epoch_order, micro_batches, steps, token_batches, token_budget

LENGTHS = np.array([5, 40, 7, 12, 33, 8, 21, 6, 30, 11])


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_steps_cover_each_epoch_once_in_a_new_order() -> None:
    batches = list(steps(LENGTHS, batch_size=4, epochs=2, most=None, seed=3))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = flat(batches[:3]), flat(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert len(list(steps(LENGTHS, 4, 2, most=5, seed=3))) == 5
    assert epoch_order(10, 0, 3).tolist() == first


def test_the_same_seed_gives_the_same_steps() -> None:
    one, two, other = (list(steps(LENGTHS, 3, 2, most=None, seed=seed, grouping=2)) for seed in (1, 1, 2))
    assert one == two != other


def test_grouping_puts_like_lengths_together_and_keeps_batches_in_random_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 960)
    batches = list(steps(lengths, 8, 1, most=None, seed=0, grouping=120))
    assert sorted(flat(batches)) == list(range(960))
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    alone = np.mean([np.ptp(lengths[batch]) for batch in steps(lengths, 8, 1, most=None, seed=0)])
    assert spread < 0.05 * alone
    means = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.25


def test_a_token_budget_without_padding_counts_tokens() -> None:
    [ordered] = deal(range(10), LENGTHS, 1)
    assert [int(LENGTHS[row]) for row in ordered] == [40, 33, 30, 21, 12, 11, 8, 7, 6, 5]
    batches = micro_batches(ordered, LENGTHS, most_rows=99, most_tokens=60, padded=False)
    assert [LENGTHS[batch].tolist() for batch in batches] == [[40], [33], [30, 21], [12, 11, 8, 7, 6, 5]]


def test_a_token_budget_with_padding_counts_the_longest() -> None:
    [ordered] = deal(range(10), LENGTHS, 1)
    batches = micro_batches(ordered, LENGTHS, most_rows=99, most_tokens=60, padded=True)
    assert [LENGTHS[batch].tolist() for batch in batches] == [[40], [33], [30, 21], [12, 11, 8, 7, 6], [5]]


def test_without_a_budget_rows_count() -> None:
    assert micro_batches([4, 2, 1], LENGTHS, most_rows=2, most_tokens=None, padded=False) == [[4, 2], [1]]


def test_a_row_over_the_budget_goes_alone() -> None:
    assert micro_batches([1, 4, 0], LENGTHS, most_rows=9, most_tokens=35, padded=False) == [[1], [4], [0]]


@pytest.mark.parametrize("padded", [False, True])
@given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=60), budget=st.integers(600, 4000))
def test_every_row_once_and_never_over_the_budget(padded: bool, lengths: list[int], budget: int) -> None:
    tokens = np.array(lengths)
    [ordered] = deal(range(len(lengths)), tokens, 1)
    batches = micro_batches(ordered, tokens, most_rows=1, most_tokens=budget, padded=padded)
    assert sorted(flat(batches)) == list(range(len(lengths)))
    cost = [len(batch) * tokens[batch].max() if padded else tokens[batch].sum() for batch in batches]
    assert max(cost) <= budget


def test_processes_get_like_shares() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 64)
    shares = deal(range(64), lengths, 4)
    assert sorted(flat(shares)) == list(range(64))
    tokens = [lengths[share].sum() for share in shares]
    assert max(tokens) < 1.1 * min(tokens)


def test_batches_of_inference_begin_with_the_longest_and_keep_to_the_budget() -> None:
    assert [LENGTHS[batch].tolist() for batch in token_batches(LENGTHS, 60, padded=True)] == [
        [40], [33], [30, 21], [12, 11, 8, 7, 6], [5],
    ]  # fmt: skip
    assert token_batches([7, 7, 90], 21, padded=True) == [[2], [0, 1]]
    assert token_batches([], 21, padded=False) == []
    assert (token_budget(5, "cuda"), token_budget(None, "cpu")) == (5, BATCH_TOKENS["cpu"])
    assert token_budget(None, "xpu") == BATCH_TOKENS["cuda"]
