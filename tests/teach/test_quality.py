"""What needs no labels, by hand; and when a teacher is worse."""

import numpy as np
import pytest

from pipeline.teach.quality import Quality, label_free_metrics, text_halves, worse_than_untrained


def test_measures_without_labels_by_hand() -> None:
    first = np.array([[2.0, 0.0], [0.0, 3.0]], dtype=np.float32)
    same = label_free_metrics(first, first)
    assert same == {"anisotropy": 0.0, "uniformity": -4.0, "alignment": 0.0, "halves": 1.0}
    turned = label_free_metrics(first, first[::-1])
    assert turned == {"anisotropy": 0.0, "uniformity": -4.0, "alignment": 2.0, "halves": 0.0}
    one_way = label_free_metrics(np.ones((3, 4), np.float32), np.ones((3, 4), np.float32))
    assert (one_way["anisotropy"], one_way["uniformity"]) == (1.0, 0.0)


def test_texts_are_halved_by_words() -> None:
    texts = ["one two three", "one two three four five", "a b c d", "e f g h"]
    assert text_halves(texts, 2) == [("one two", "three four five"), ("a b", "c d")]


@pytest.mark.parametrize(("ours", "worse"), [(0.6, False), (0.5, False), (0.4, True)])
def test_worse_is_below_mean_pooling(ours: float, worse: bool) -> None:
    found = Quality({"backbone-mean/mean/tasks": 0.5, "simcse/mean/tasks": ours}, [], {})
    assert bool(worse_than_untrained(found)) is worse


def test_the_better_untrained_reading_is_compared_with() -> None:
    metrics = {"backbone-mean/mean/tasks": 0.5, "echo-standardized/mean/tasks": 0.7, "simcse/mean/tasks": 0.6}
    other = {"of": "simcse", "system": "backbone-mean", "metric": "mean/tasks", "low": 0.05, "high": 0.15}
    delta = {**other, "system": "echo-standardized", "low": -0.2, "high": 0.01}
    found = str(worse_than_untrained(Quality(metrics, [other, delta], {})))
    assert "0.7000 (-0.1000, interval -0.2000 to +0.0100)" in found
    assert "template echo" in found


def test_what_was_not_measured_is_not_worse() -> None:
    assert worse_than_untrained(Quality({}, [], {})) is None


def test_the_interval_is_named() -> None:
    delta = {"of": "simcse", "system": "backbone-mean", "metric": "mean/tasks", "low": -0.2, "high": -0.01}
    found = Quality({"backbone-mean/mean/tasks": 0.5, "simcse/mean/tasks": 0.4}, [delta], {})
    assert "(-0.1000, interval -0.2000 to -0.0100)" in str(worse_than_untrained(found))
