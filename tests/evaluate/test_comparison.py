"""Flat metrics become tables: in reading order, with the differences and verdicts that the record holds."""

import pytest

from pipeline.evaluate.comparison import Cell, compare
from pipeline.probe.descriptions import describe
from pipeline.report.sections import untrained_spread

SYSTEMS = {"student": {}, "teacher": {}}
MEANS = ("mean/tasks", "type/STS")
METRICS = {
    "student/Facts": 0.5, "student/mean/tasks": 0.5, "teacher/Facts": 0.625, "teacher/mean/tasks": 0.625,
    "delta/Facts": -0.125, "delta/mean/tasks": -0.125,
}  # fmt: skip


def delta(metric: str, system: str, value: float, low: float | None, high: float | None, verdict: str) -> dict:
    return {
        "metric": metric, "system": system, "delta": value, "low": low, "high": high, "verdict": verdict, "units": 9,
    }  # fmt: skip


def test_a_record_without_deltas_gives_differences_and_no_verdict() -> None:
    task, mean = compare("demo", {"metrics": METRICS, "systems": SYSTEMS}).rows
    assert (task.metric, task.summary, mean.metric, mean.summary) == ("Facts", False, "mean/tasks", True)
    assert task.cells == [Cell(0.5), Cell(0.625, -0.125)]


def test_deltas_are_taken_over_from_the_record() -> None:
    deltas = [
        delta("Facts", "teacher", -0.125, -0.2, -0.05, "worse"),
        delta("mean/tasks", "teacher", -0.125, None, None, "no interval"),
        delta("Facts", "somebody", 0.9, 0.8, 1.0, "better"),
    ]
    task, mean = compare("demo", {"metrics": METRICS, "systems": SYSTEMS, "deltas": deltas}).rows
    assert task.cells == [Cell(0.5), Cell(0.625, -0.125, -0.2, -0.05, "worse")]
    assert mean.cells == [Cell(0.5), Cell(0.625, -0.125, None, None, "no interval")]


@pytest.mark.parametrize("deltas", [[], [1], [{"metric": "Facts"}], [{"metric": "Facts", "system": "teacher"}]])
def test_a_score_that_the_record_does_not_compare_has_no_difference(deltas: list[object]) -> None:
    table = compare("demo", {"metrics": METRICS, "systems": SYSTEMS, "deltas": deltas})
    assert table.rows[0].cells[1] == Cell(0.625)


@pytest.mark.parametrize(
    ("probe", "lower", "higher"),
    [
        ("safety", ["accuracy@1", "accuracy@100", "any_harm@5"], []),
        ("refusal", ["over_refusal", "under_refusal"], ["auroc"]),
        ("alignment", ["anisotropy"], ["cosine", "top1", "mrr", "overlap@10"]),
        ("reasoning", [], ["accuracy@1", "mean/tasks"]),
    ],
)
def test_which_metrics_are_better_when_lower(probe: str, lower: list[str], higher: list[str]) -> None:
    metrics = {f"student/{name}": 0.5 for name in [*lower, *higher]}
    table = compare(probe, {"metrics": metrics, "systems": SYSTEMS}, describe(probe).lower_is_better)
    assert {row.metric for row in table.rows if row.lower_is_better} == set(lower)
    assert {row.metric for row in table.rows if not row.lower_is_better} == set(higher)


def test_a_mean_is_compared_with_the_reading_that_is_best_on_it() -> None:
    scores = {"student": (0.5, 0.6), "echo": (0.4, 0.7), "untrained-standardized-1": (0.45, 0.1), "teacher": (0.9, 0.9)}
    metrics = {
        f"{name}/{mean}": score for name, both in scores.items() for mean, score in zip(MEANS, both, strict=True)
    }
    deltas = [delta("type/STS", "echo", -0.1, -0.2, 0.0, "within noise")]
    record = {"metrics": metrics, "systems": {key: {} for key in scores}, "deltas": deltas}
    tasks, kind = compare("demo", record).gains
    assert (tasks.metric, tasks.student, tasks.reading) == ("mean/tasks", 0.5, "untrained-standardized-1")
    assert (kind.metric, kind.student, kind.reading) == ("type/STS", 0.6, "echo")
    assert kind.over_reading == Cell(0.7, -0.1, -0.2, 0.0, "within noise")
    assert kind.over_start is None


@pytest.mark.parametrize("missing", ["student", "echo"])
def test_without_a_student_or_a_reading_nothing_was_added(missing: str) -> None:
    names = {"student", "echo", "teacher"} - {missing}
    record = {"metrics": {f"{name}/mean/tasks": 0.5 for name in names}, "systems": {key: {} for key in names}}
    assert compare("demo", record).gains == []


def test_facts_are_what_belongs_to_no_system() -> None:
    metrics = {
        "requests": 10, "student/accuracy@1": 0.2, "teacher/accuracy@1": 0.6, "delta/accuracy@1": -0.4,
        "reduction/student/accuracy@1": 66.67, "reduction/untrained/accuracy@1": 1.0, "backbone/refusal_rate_safe": 0.1,
    }  # fmt: skip
    table = compare("safety", {"metrics": metrics, "systems": SYSTEMS})
    assert table.facts == [
        ("requests", 10), ("reduction/student/accuracy@1", 66.67), ("backbone/refusal_rate_safe", 0.1),
    ]  # fmt: skip


def test_systems_stand_in_reading_order() -> None:
    names = [
        "a-model", "backbone-mean", "echo", "hyde", "student", "teacher", "untrained", "untrained-10", "untrained-2",
        "untrained-x", "z-1",
    ]  # fmt: skip
    metrics = {f"{name}/accuracy@{k}": 0.5 for name in names for k in (1, 100, 20, 5)}
    table = compare("safety", {"metrics": metrics, "systems": {name: {} for name in names}})
    assert table.systems == [
        "student", "teacher", "untrained", "untrained-2", "untrained-10", "backbone-mean", "echo", "hyde", "a-model",
        "untrained-x", "z-1",
    ]  # fmt: skip
    assert [row.metric for row in table.rows] == ["accuracy@1", "accuracy@5", "accuracy@20", "accuracy@100"]


def test_a_score_can_be_asked_for() -> None:
    table = compare("demo", {"metrics": METRICS, "systems": SYSTEMS})
    assert table.tasks == {"Facts"}
    assert table.score("teacher", "mean/tasks") == 0.625
    assert table.score("teacher", "type/STS") is None
    assert table.score("hyde", "Facts") is None


def test_a_record_without_metrics_is_an_empty_table() -> None:
    assert compare("x", {"metrics": [1], "systems": None}).rows == []


def test_spread_is_over_the_means_where_there_are_some() -> None:
    metrics = {
        "untrained-1/a": 0.1, "untrained-2/a": 0.3, "untrained-1/mean/tasks": 0.1, "untrained-2/mean/tasks": 0.5,
        "untrained-3/mean/tasks": 0.3, "student/mean/tasks": 0.9,
    }  # fmt: skip
    systems = {name: {} for name in ("student", "untrained-1", "untrained-2", "untrained-3")}
    (spread,) = untrained_spread(compare("x", {"metrics": metrics, "systems": systems}))
    assert (spread.metric, spread.seeds) == ("mean/tasks", 3)
    assert spread.mean == pytest.approx(0.3)
    assert spread.deviation == pytest.approx(0.2)


def test_one_start_has_no_spread() -> None:
    systems = {"untrained": {}, "untrained-x": {}}
    table = compare("x", {"metrics": {"untrained/a": 0.1, "untrained-x/a": 1}, "systems": systems})
    assert untrained_spread(table) == []
