"""Ranks against a case counted by hand."""

import numpy as np
import pytest

from pipeline.ranking import rank_own


def test_ranks_by_hand() -> None:
    queries = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, -3.0]])
    answers = np.array([[1.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    ranked = rank_own(queries, answers)
    assert ranked.cosines == pytest.approx([1.0, np.sqrt(0.5), -1.0])
    assert ranked.ranks.tolist() == [1, 3, 3]  # ties count against: all three answers are as near, or both others
    assert ranked.nearest[0] == 0
    assert (ranked.top1, ranked.cosine) == (1 / 3, pytest.approx(np.sqrt(0.5) / 3))
    assert ranked.mrr == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)


def test_a_zero_vector_is_far_from_everything() -> None:
    assert rank_own(np.zeros((1, 2)), np.ones((1, 2))).cosine == 0.0
