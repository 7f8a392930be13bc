"""Ranks against a case counted by hand."""

import numpy as np
import pytest

import pipeline.core.vectors as ranking
from pipeline.core.vectors import Anisotropy, anisotropy, neighbour_overlap, neighbours, rank_own


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


@pytest.mark.parametrize("block", [1, 3, 100])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(ranking, "BLOCK", block)
    random = np.random.default_rng(0)
    queries, answers = random.normal(size=(8, 5)), random.normal(size=(8, 5))
    unit = [matrix / np.linalg.norm(matrix, axis=1, keepdims=True) for matrix in (queries, answers)]
    cosines = unit[0] @ unit[1].T
    ranked = rank_own(queries, answers)
    np.testing.assert_allclose(ranked.cosines, np.diag(cosines))
    assert ranked.ranks.tolist() == [int((row >= row[i]).sum()) for i, row in enumerate(cosines)]
    assert ranked.nearest.tolist() == cosines.argmax(axis=1).tolist()
    among = unit[0] @ unit[0].T - 9 * np.eye(8)
    assert np.sort(neighbours(queries, 3)).tolist() == np.sort(np.argsort(-among)[:, :3]).tolist()


def test_neighbours_on_a_circle() -> None:
    angles = np.radians([0, 10, 21, 90, 101])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1.0], [5.0], [1.0], [0.1], [1.0]])
    assert neighbours(vectors, 1)[:, 0].tolist() == [1, 0, 1, 4, 3]
    assert np.sort(neighbours(vectors, 2)).tolist() == [[1, 2], [0, 2], [0, 1], [2, 4], [2, 3]]


def test_shared_neighbours_are_a_share() -> None:
    first, second = np.array([[1, 2], [0, 2], [0, 1]]), np.array([[2, 1], [2, 3], [3, 4]])
    assert neighbour_overlap(first, second).tolist() == [1.0, 0.5, 0.0]


def test_anisotropy_is_the_mean_cosine_of_pairs() -> None:
    assert anisotropy(np.array([[1.0, 0.0], [0.0, 3.0]])) == 0.0
    assert anisotropy(np.array([[2.0, 2.0], [5.0, 5.0], [1.0, 1.0]])) == pytest.approx(1.0)
    assert anisotropy(np.array([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-1.0)
    vectors = np.random.default_rng(1).normal(size=(6, 3)) + 1
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(6) for j in range(6) if i != j]
    assert anisotropy(vectors) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert anisotropy(vectors[:1]) is None


def test_anisotropy_of_batches_is_that_of_all_pairs() -> None:
    vectors = np.random.default_rng(0).normal(size=(ranking.BLOCK + 50, 4)) + 1.0
    running = Anisotropy()
    running.add(vectors[:10])
    running.add(vectors[10:])
    assert running.value == anisotropy(vectors)
