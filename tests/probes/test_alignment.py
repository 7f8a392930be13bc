"""Held-out alignment by hand."""

import numpy as np

from pipeline.probes.alignment import alignment_metrics, ranked


def test_ranks_and_metrics_by_hand() -> None:
    answers = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    queries = np.array([[2.0, 0.0], [1.0, 0.2], [3.0, 3.0]])
    rows = ranked("s", ["a", "b", "c"], queries, answers)
    assert rows["rank"].to_pylist() == [1, 3, 1]
    assert rows["nearest"].to_pylist() == ["a", "a", "c"]
    np.testing.assert_allclose(rows["cosine"].to_numpy(), [1.0, 0.2 / np.hypot(1, 0.2), 1.0], rtol=1e-5)
    metrics = alignment_metrics(rows)
    assert metrics["top1"] == round(2 / 3, 6)
    assert metrics["mrr"] == round((1 + 1 / 3 + 1) / 3, 6)


def test_a_constant_system_finds_nothing() -> None:
    """Ties count against: an embedder that maps everything to one point must not look perfect."""
    rows = ranked("s", ["a", "b", "c"], np.ones((3, 2)), np.ones((3, 2)))
    assert rows["rank"].to_pylist() == [3, 3, 3]


def test_a_zero_vector_is_no_error() -> None:
    rows = ranked("s", ["a", "b"], np.zeros((2, 2)), np.eye(2))
    assert rows["cosine"].to_pylist() == [0.0, 0.0]
