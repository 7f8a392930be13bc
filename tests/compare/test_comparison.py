"""Students of two runs: differences, intervals over the same units, and what must not be compared."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.compare.comparison import RunComparison, compare_runs, flatten
from pipeline.compare.runs import open_run
from pipeline.core.bootstrap import BootstrapParams
from pipeline.core.errors import EvaluationError
from pipeline.evaluate.comparison import Cell
from tests.compare.runs import write_run

SETTINGS = BootstrapParams(resamples=200)


def compared(*folders: Path, **options: Any) -> RunComparison:
    return compare_runs([open_run(str(folder)) for folder in folders], SETTINGS, **options)


def cells(found: RunComparison, table: str, metric: str) -> list[Cell]:
    [rows] = [each.rows for each in found.tables if each.name == table]
    [row] = [row for row in rows if row.metric == metric]
    return row.cells


def test_a_student_that_is_better_on_every_query_is_better_in_every_resample(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [0.0, 0.25, 0.25, 0.5])
    other = write_run(tmp_path / "b", [0.5, 0.75, 0.75, 1.0])
    found = compared(first, other)
    assert cells(found, "suite demo", "search") == [Cell(0.25), Cell(0.75, 0.5, 0.5, 0.5, "better")]
    assert cells(found, "suite demo", "mean/tasks")[1].delta == pytest.approx(0.5)
    assert found.seconds == {"evaluate demo": [40, 40]}
    assert found.notes == []


def test_the_interval_of_a_difference_is_over_paired_queries(tmp_path: Path) -> None:
    # Query by query the differences are +1, -1, +1, -1: their mean is 0, and no resample goes beyond -1 and 1.
    found = compared(write_run(tmp_path / "a", [0.0, 1.0, 0.0, 1.0]), write_run(tmp_path / "b", [1.0, 0.0, 1.0, 0.0]))
    cell = cells(found, "suite demo", "search")[1]
    assert cell.delta == 0 and cell.verdict == "within noise"
    assert cell.low is not None and cell.high is not None and -1 <= cell.low < 0 < cell.high <= 1


def test_a_probe_is_compared_by_its_rows(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [0.5, 0.5], ranks=[2, 2, 2, 1])
    other = write_run(tmp_path / "b", [0.5, 0.5], ranks=[1, 1, 1, 1])
    top1 = cells(compared(first, other), "probe alignment", "top1")
    assert top1[0] == Cell(0.25)
    assert top1[1].score == 1.0 and top1[1].delta == 0.75 and top1[1].low is not None


TEACHER = {"kind": "hash", "width": 4}


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        ({"student": {"space": "the teacher's"}, "teacher": {"identity": TEACHER}}, True),
        ({"student": {"space": "the teacher's"}}, True),  # nothing says that it is another
        ({"student": {"space": "its own"}, "teacher": {"identity": TEACHER}}, False),
        ({"teacher": {"identity": {**TEACHER, "width": 5}}}, False),
        ({"teacher": {"identity": {**TEACHER, "transform": {"kind": "center", "sha256": "a"}}}}, False),
    ],
)
def test_cosines_in_two_spaces_have_no_difference(tmp_path: Path, other: dict[str, Any], alike: bool) -> None:
    first = {"student": {"space": "the teacher's"}, "teacher": {"identity": TEACHER}}
    runs = [write_run(tmp_path / name, [0.5], ranks=[1, 2], systems=of) for name, of in (("a", first), ("b", other))]
    found = compared(*runs)
    delta = cells(found, "probe alignment", "cosine")[1].delta
    assert delta == (0.0 if alike else None)
    assert cells(found, "probe alignment", "cosine")[1].score == 0.5
    assert cells(found, "probe alignment", "top1")[1].delta == 0.0
    note = "probe alignment: cosine not compared, the runs measured it in other spaces"
    assert found.notes == ([] if alike else [note])


def test_three_runs_are_each_compared_with_the_first(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(index), [index / 4, index / 4]) for index in range(3)]
    assert [cell.delta for cell in cells(compared(*folders), "suite demo", "search")] == [None, 0.25, 0.5]


def test_other_queries_leave_a_difference_without_an_interval(tmp_path: Path) -> None:
    found = compared(write_run(tmp_path / "a", [0.0, 0.5]), write_run(tmp_path / "b", [0.25, 0.75], key="other"))
    assert cells(found, "suite demo", "search")[1] == Cell(0.5, 0.25, None, None, "no interval")


def test_an_undefined_score_is_no_number(tmp_path: Path) -> None:
    known, undefined = write_run(tmp_path / "a", [0.25, 0.25]), write_run(tmp_path / "b", [0.25, float("nan")])
    for metric in ("search", "mean/tasks"):
        assert cells(compared(known, undefined), "suite demo", metric) == [Cell(0.25), Cell(None)]
        assert cells(compared(undefined, known), "suite demo", metric) == [Cell(None), Cell(0.25)]


@pytest.mark.parametrize("change", [{"data_revision": "r2"}, {"mteb_version": "2.1"}, {"instructions": "abd"}])
def test_other_data_versions_and_instructions_are_refused_unless_asked(tmp_path: Path, change: dict[str, str]) -> None:
    first, other = write_run(tmp_path / "a", [0.0, 1.0]), write_run(tmp_path / "b", [1.0, 1.0], **change)
    [value] = change.values()
    with pytest.raises(EvaluationError, match=rf"suite demo: .*{re.escape(value)}.*--allow-different"):
        compared(first, other)
    found = compared(first, other, allow_different=True)
    assert cells(found, "suite demo", "search")[1].delta == 0.5
    assert len(found.notes) == 1 and value in found.notes[0]


def test_what_only_one_run_has_is_left_out_and_noted(tmp_path: Path) -> None:
    found = compared(write_run(tmp_path / "a", [0.0, 1.0], ranks=[1]), write_run(tmp_path / "b", [0.0, 1.0]))
    assert [table.name for table in found.tables] == ["suite demo"]
    assert len(found.notes) == 1 and "alignment" in found.notes[0]


def test_params_that_differ_are_listed_with_both_values(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [0.0], params="train: {epochs: 1, seed: 0}\n")
    other = write_run(tmp_path / "b", [0.0], params="train: {epochs: 2, seed: 0, lora: {r: 8}}\n")
    assert compared(first, other).params == {"train.epochs": [1, 2], "train.lora.r": [None, 8]}


def test_nested_mappings_are_flattened_to_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": 1, "a.c": [1, 2], "d": None}
