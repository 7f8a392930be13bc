import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.core.bootstrap import (
    BootstrapParams,
    Sampled,
    combine,
    delta_of,
    paired_delta,
    sample_means,
    statistic_delta,
)

SETTINGS = BootstrapParams()


def test_two_units_have_the_interval_that_can_be_counted() -> None:
    # The resampled mean of (0, 1) is 0, 1/2, 1/2 or 1, each as likely.
    delta = paired_delta("recall", "teacher", [0.0, 1.0], [0.0, 0.0], SETTINGS)
    assert (delta.delta, delta.low, delta.high, delta.verdict, delta.units) == (0.5, 0.0, 1.0, "within noise", 2)
    narrow = paired_delta("recall", "teacher", [0.0, 1.0], [0.0, 0.0], BootstrapParams(level=0.4))
    assert (narrow.low, narrow.high, narrow.verdict) == (0.5, 0.5, "better")


def test_the_interval_of_many_units_is_that_of_the_normal_law() -> None:
    rng = np.random.default_rng(0)
    other, gain = rng.normal(0, 10, 2000), rng.normal(0.2, 1, 2000)
    delta = paired_delta("score", "teacher", other + gain, other, SETTINGS)
    error = gain.std() / np.sqrt(2000)
    assert delta.low == pytest.approx(gain.mean() - 1.96 * error, abs=0.15 * error)
    assert delta.high == pytest.approx(gain.mean() + 1.96 * error, abs=0.15 * error)
    assert delta.verdict == "better"  # unpaired, the spread of 10 would drown a gain of 0.2


@pytest.mark.parametrize(
    ("difference", "lower_is_better", "verdict"),
    [
        (0.25, False, "better"),
        (-0.25, False, "worse"),
        (0.25, True, "worse"),
        (-0.25, True, "better"),
        (0, False, "within noise"),
    ],
)
def test_equal_differences_have_an_interval_of_no_width(difference: float, lower_is_better: bool, verdict: str) -> None:
    other = np.arange(8) / 4
    delta = paired_delta("score", "teacher", other + difference, other, SETTINGS, lower_is_better=lower_is_better)
    assert delta.low == delta.high == delta.delta == difference
    assert delta.verdict == verdict


def test_a_statistic_is_resampled_as_its_means_are() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.random(50), rng.random(50)
    by_means = paired_delta("score", "echo", ours, theirs, SETTINGS)
    by_statistic = statistic_delta(
        "score", "echo", lambda rows: (float(ours[rows].mean()), float(theirs[rows].mean())), 50, SETTINGS
    )
    assert by_statistic == by_means
    assert paired_delta("score", "echo", ours, theirs, SETTINGS) == by_means
    assert paired_delta("score", "echo", ours, theirs, BootstrapParams(seed=1)) != by_means


def test_without_resamples_or_with_one_unit_there_is_no_interval() -> None:
    for settings, units in ((BootstrapParams(resamples=0), 9), (SETTINGS, 1)):
        delta = paired_delta("score", "echo", np.ones(units), np.zeros(units), settings)
        assert (delta.delta, delta.low, delta.high, delta.verdict) == (1.0, None, None, "no interval")
        assert delta.units == units


def test_units_that_are_not_paired_are_refused() -> None:
    with pytest.raises(ValueError, match=r"score: units are not paired: \(2,\) against \(3,\)"):
        paired_delta("score", "echo", [1.0, 2.0], [1.0, 2.0, 3.0], SETTINGS)
    with pytest.raises(ValidationError, match=r"resamples \(50\) must be 0 or at least 100"):
        BootstrapParams(resamples=50)


def test_a_mean_of_tasks_is_as_uncertain_as_independent_tasks_make_it() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0, 1, 400)
    parts = [sample_means(name, values, np.zeros(400), SETTINGS) for name in ("a", "b")]
    whole = combine(parts, [0.5, 0.5])
    assert whole.value == pytest.approx(values.mean())
    assert whole.units == 800
    assert whole.replicates is not None
    assert np.std(whole.replicates) == pytest.approx(values.std() / 20 / np.sqrt(2), rel=0.08)


def test_a_mean_has_no_interval_if_one_task_has_none() -> None:
    part = sample_means("a", np.arange(9), np.zeros(9), SETTINGS)
    whole = combine([part, Sampled(1.0, None, 0)], [0.5, 0.5])
    assert delta_of("mean/tasks", "echo", whole, SETTINGS).verdict == "no interval"
    assert whole.value == 2.5


def test_resamples_without_a_score_are_left_out_unless_they_are_many() -> None:
    few, many = np.ones(1000), np.ones(1000)
    few[:50], many[:150] = np.nan, np.nan
    assert delta_of("score", "echo", Sampled(1.0, few, 16), SETTINGS).low == 1.0
    assert delta_of("score", "echo", Sampled(1.0, many, 16), SETTINGS).verdict == "no interval"
