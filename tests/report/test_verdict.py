"""The first screen of the report: who is compared, what the sentence says, and what it warns of."""

import pytest

from pipeline.evaluate.comparison import Cell, Comparison, Row
from pipeline.report.verdict import MeanScore, verdict

SYSTEMS = ["student", "teacher", "echo", "backbone-mean", "labelled"]


def table(**rows: list[Cell]) -> Comparison:
    """A suite of five systems; a name with a double underscore is a mean."""
    return Comparison(
        "demo",
        SYSTEMS,
        {},
        {},
        [Row(name.replace("__", "/"), cells, "__" in name, False) for name, cells in rows.items()],
        [],
    )


def row(student: float, *others: tuple[float, float, float, str]) -> list[Cell]:
    """The student's score, then of each other system its score, the ends of student minus it, and the verdict."""
    return [
        Cell(student),
        *(Cell(score, round(student - score, 6), low, high, verdict) for score, low, high, verdict in others),
    ]


MEANS = row(
    0.75,
    (0.5, 0.125, 0.375, "better"),
    (0.625, -0.125, 0.375, "within noise"),
    (0.25, 0.25, 0.75, "better"),
    (0.875, -0.25, 0.0, "worse"),
)


def test_the_teacher_and_the_best_untrained_reading_stand_beside_the_student() -> None:
    found = verdict([table(a=MEANS, mean__tasks=MEANS)], 60.0, 500)
    assert found is not None
    # An interval of the difference [low, high] is student - high to student - low around the system's own mean.
    assert found.means == [
        MeanScore("student", 0.75),
        MeanScore("teacher", 0.5, 0.375, 0.625, "better"),
        MeanScore("echo", 0.625, 0.375, 0.875, "within noise"),
    ]
    assert found.sentence == (
        "Mean over 1 task of demo: the student 0.750; its teacher 0.500 (the student is better); "
        "the best untrained reading, echo, 0.625 (the student is within noise of it)"
    )
    assert any("500" in line and "160,000" in line for line in found.cautions)


def test_a_task_is_better_against_both_and_worse_against_either() -> None:
    better = row(
        0.5, (0.25, 0.1, 0.4, "better"), (0.25, 0.1, 0.4, "better"), (0.9, -1, -0.1, "worse"), (0.5, 0, 0, "better")
    )
    mixed = row(
        0.5, (0.25, 0.1, 0.4, "better"), (0.75, -0.4, -0.1, "worse"), (0.1, 0, 1, "better"), (0.5, 0, 0, "better")
    )
    level = row(
        0.5, (0.5, -0.1, 0.1, "within noise"), (0.25, 0.1, 0.4, "better"), (0.1, 0, 1, "better"), (0.5, 0, 0, "better")
    )
    found = verdict([table(a=better, b=mixed, c=level, mean__tasks=MEANS)], 60.0, None)
    assert found is not None
    assert (found.better, found.worse) == (["a"], ["b"])


def test_tasks_without_intervals_are_neither_better_nor_worse() -> None:
    plain = [Cell(0.5), Cell(0.25, 0.25), Cell(0.25, 0.25, verdict="no interval"), Cell(0.9), Cell(0.5)]
    found = verdict([table(a=plain, b=MEANS, mean__tasks=MEANS)], 60.0, None)
    assert found is not None
    assert found.uncompared == ["a"]
    assert found.lines[-1] == "Not compared by an interval on a"
    compared = verdict([table(b=MEANS, mean__tasks=MEANS)], 60.0, None)
    assert compared is not None and len(compared.lines) == 2


@pytest.mark.parametrize("rows", [{}, {"a": MEANS}], ids=["an empty suite", "no mean"])
def test_there_is_no_verdict_without_a_mean(rows: dict[str, list[Cell]]) -> None:
    assert verdict([table(**rows)], 60.0, 500) is None


def test_a_teacher_without_a_mean_is_left_out_and_not_0() -> None:
    undefined = [Cell(0.75), Cell(None), Cell(0.5, 0.25, 0.125, 0.375, "better"), Cell(None), Cell(None)]
    found = verdict([table(a=undefined, mean__tasks=undefined)], 1.0, None)
    assert found is not None
    assert found.means == [MeanScore("student", 0.75), MeanScore("echo", 0.5, 0.375, 0.625, "better")]
    assert found.lines[0] == "Better than echo on a"
    assert found.cautions[0] == "The teacher has no mean: its score of a task is undefined."
    alone = [Cell(0.75), *[Cell(None)] * 4]
    assert verdict([table(a=alone, mean__tasks=alone)], 1.0, None) is None


def test_scores_without_intervals_are_called_so() -> None:
    found = verdict([table(mean__tasks=[Cell(0.75), Cell(0.5, 0.25), Cell(None), Cell(None), Cell(None)])], 1.0, None)
    assert found is not None
    assert found.means[1] == MeanScore("teacher", 0.5)
    assert "not compared by an interval" in found.sentence
