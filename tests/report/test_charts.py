"""Forest plots draw the record's differences and intervals, all of one table on one scale."""

import re
from typing import Any

from pipeline.evaluate.comparison import Comparison, compare
from pipeline.report.charts import MOST_TASKS, ForestLine, forest_lines, forests


def table(tasks: int = 2, name: str = "demo", baseline: str = "teacher") -> Comparison:
    names = [f"Task{number}" for number in range(tasks)] + ["type/STS"]
    metrics: dict[str, Any] = {f"{system}/{metric}": 0.5 for system in ("student", baseline) for metric in names}
    deltas = [
        {"metric": metric, "system": baseline, "delta": 0.1, "low": -0.1, "high": 0.3, "verdict": "within noise"}
        for metric in names
    ]
    return compare(name, {"metrics": metrics, "systems": {"student": {}, baseline: {}}, "deltas": deltas})


def test_lines_are_the_records_differences() -> None:
    found = forest_lines(table(1), "teacher")
    assert found == [
        ForestLine("Task0", 0.1, -0.1, 0.3, "within noise"),
        ForestLine("type/STS", 0.1, -0.1, 0.3, "within noise"),
    ]
    assert forest_lines(table(1), "student") == []


def test_many_tasks_leave_the_means_alone() -> None:
    assert len(forest_lines(table(MOST_TASKS), "teacher")) == MOST_TASKS + 1
    assert [line.metric for line in forest_lines(table(MOST_TASKS + 1), "teacher")] == ["type/STS"]


def test_no_interval_no_chart() -> None:
    record = {"metrics": {"student/A": 0.5, "teacher/A": 0.25}, "systems": {"student": {}, "teacher": {}}}
    assert forests(compare("demo", record)) == []


def test_a_chart_names_what_it_shows_and_takes_the_pages_colours() -> None:
    (chart,) = forests(table())
    assert chart.startswith('<svg role="img" aria-label="demo: student minus teacher"')
    assert {"var(--dim)", "currentColor"} <= set(re.findall(r"var\(--\w+\)|currentColor", chart))
    assert not re.findall(r"#01020\d", chart)
    assert chart == forests(table())[0]


def test_verdicts_differ_in_shape_and_fill_not_in_colour_alone() -> None:
    charts = []
    for verdict in ("better", "worse", "within noise"):
        metrics = {"student/A": 0.5, "teacher/A": 0.25}
        delta = {"metric": "A", "system": "teacher", "delta": 0.25, "low": 0.125, "high": 0.5, "verdict": verdict}
        record = {"metrics": metrics, "systems": {"student": {}, "teacher": {}}, "deltas": [delta]}
        charts.append(re.sub(r"var\(--\w+\)", "colour", forests(compare("demo", record))[0]))
    assert len(set(charts)) == 3


def test_names_are_not_markup() -> None:
    (chart,) = forests(table(name='<b>"', baseline="a$b$<i>"))
    assert "<b>" not in chart
    assert "<i>" not in chart
    assert 'aria-label="&lt;b&gt;&quot;: student minus a$b$&lt;i&gt;"' in chart
    assert "a$b$" in chart.partition(">")[2]
