from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, f1_score

from pipeline.evaluate.unit_scores import UnitScores, as_counts, load, save

UNITS = 40


def unit_scores(kind: str, gold: np.ndarray, found: np.ndarray) -> UnitScores:
    return UnitScores("test", "default", "pair", "key", kind, gold, found)  # type: ignore[arg-type]


@pytest.fixture
def drawn() -> np.ndarray:
    """Five resamples of the units, with repeats."""
    return np.random.default_rng(0).integers(0, UNITS, (5, UNITS))


def test_units_are_counted() -> None:
    assert as_counts(np.array([[0, 0, 2], [1, 2, 0]])).tolist() == [[2, 0, 1], [1, 1, 1]]


def test_a_mean_is_weighted_by_the_counts() -> None:
    part = unit_scores("mean", np.zeros(0), np.array([1.0, 0.0, 4.0]))
    assert part.score() == pytest.approx(5 / 3)
    assert part.scores(as_counts(np.array([[0, 0, 2]]))) == pytest.approx(6 / 3)


def test_spearman_on_counts_is_scipys_on_repeated_pairs(drawn: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    gold, found = rng.integers(0, 6, UNITS) / 5, np.round(rng.random(UNITS), 1)
    expected = [spearmanr(gold[rows], found[rows]).statistic for rows in drawn]
    part = unit_scores("spearman", gold, found)
    assert part.scores(as_counts(drawn)) == pytest.approx(expected)
    assert part.score() == pytest.approx(spearmanr(gold, found).statistic)
    assert np.isnan(unit_scores("spearman", gold, np.ones(UNITS)).score())


def test_average_precision_on_counts_is_sklearns_and_the_best_measure_counts(drawn: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    gold, found = rng.integers(0, 2, UNITS), np.round(rng.random((2, UNITS)), 1)
    expected = [max(average_precision_score(gold[rows], one[rows]) for one in found) for rows in drawn]
    assert unit_scores("ap", gold, found).scores(as_counts(drawn)) == pytest.approx(expected)


def test_macro_f1_on_counts_is_sklearns_over_all_classifiers(drawn: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    gold, found = rng.integers(0, 7, UNITS), rng.integers(0, 7, (3, UNITS))
    expected = [np.mean([f1_score(gold[rows], one[rows], average="macro") for one in found]) for rows in drawn]
    assert unit_scores("f1", gold, found).scores(as_counts(drawn)) == pytest.approx(expected)


def test_unit_scores_are_loaded_as_saved_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "task.findings.npz"
    assert load(path) is None
    parts = [
        unit_scores("spearman", np.arange(3.0), np.arange(3.0) ** 2),
        unit_scores("mean", np.zeros(0), np.array([1.0, 0.5])),
    ]
    save(path, parts)
    found = load(path)
    assert found is not None and [part.kind for part in found] == ["spearman", "mean"]
    assert found[1].key == "key" and found[1].predicted.tolist() == [1.0, 0.5]
    content = path.read_bytes()
    for damaged in (content[:100], content[:-40], content.replace(b"\x93NUMPY", b"\x93NUMPI"), b""):
        path.write_bytes(damaged)
        assert load(path) is None or damaged == content
