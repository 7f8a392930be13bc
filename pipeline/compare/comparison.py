"""Scores of several runs' students, each with its difference to the first run's and a paired bootstrap interval.

Queries, pairs and texts are drawn with replacement, the same for all runs (`pipeline/core/bootstrap.py`). A task is
compared only where all runs scored the same data with the same version of mteb and the same instructions.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.compare.runs import STUDENT, Run
from pipeline.core.bootstrap import BootstrapParams, Delta, delta_of
from pipeline.core.errors import EvaluationError
from pipeline.evaluate.comparison import Cell, Comparison, Row
from pipeline.evaluate.deltas import resample_task, task_difference, with_means
from pipeline.evaluate.summary import mean_weights, task_scores
from pipeline.lens.faithfulness import teacher_difference
from pipeline.probe.base import find_probe
from pipeline.probe.descriptions import describe, probe_names

log = logging.getLogger(__name__)

# Metrics of probes that are cosines to a teacher's vectors.
_TO_TARGETS = ("cosine", "cosine_embedding", "cosine_response")
# What a probe records of a system whose space it is.
_TEACHERS_SPACE = "the teacher's"


@dataclass(frozen=True)
class RunComparison:
    """What `compare_runs` found.

    Attributes:
        runs: names; every difference is to the first one.
        tables: of each suite and probe that all runs have; a column a run.
        params: dotted keys whose values differ, with each run's value.
        seconds: of each stage by run, None where it has no record.
        notes: what could not be compared, and why.
    """

    runs: list[str]
    tables: list[Comparison]
    params: dict[str, list[Any]]
    seconds: dict[str, list[float | None]]
    notes: list[str]


def compare_runs(runs: Sequence[Run], settings: BootstrapParams, *, allow_different: bool = False) -> RunComparison:
    """Compare two runs or more.

    Args:
        allow_different: compare tasks whose data, mteb version or instructions differ, and note it.

    Raises:
        EvaluationError: such a difference without `allow_different`, a damaged file, or nothing in common.
    """
    notes = list(_missing("suite", {run.name: run.suites for run in runs}))
    notes += _missing("probe", {run.name: run.probes for run in runs})
    tables = [
        _compare_suite(runs, name, settings, notes, allow_different) for name in _common(run.suites for run in runs)
    ]
    tables += [
        _compare_probe(runs, name, settings, notes, allow_different)
        for name in _common(run.probes for run in runs)
        if name in probe_names()
    ]
    if not tables:
        raise EvaluationError("the runs have no suite and no probe in common: " + "; ".join(notes))
    records = [run.records() for run in runs]
    return RunComparison(
        runs=[run.name for run in runs],
        tables=[table for table in tables if table.rows],
        params=_differing([flatten(run.params()) for run in runs]),
        seconds={
            stage: [found.get(stage, {}).get("seconds") for found in records]
            for stage in dict.fromkeys(stage for found in records for stage in found)
        },
        notes=notes,
    )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted key; a list is a leaf."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _differing(params: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    keys = sorted({key for found in params for key in found})
    values = {key: [found.get(key) for found in params] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _common(names: Iterator[list[str]]) -> list[str]:
    first, *others = names
    return [name for name in first if all(name in other for other in others)]


def _missing(kind: str, names: Mapping[str, list[str]]) -> Iterator[str]:
    for name in dict.fromkeys(name for found in names.values() for name in found):
        if without := [run for run, found in names.items() if name not in found]:
            yield f"{kind} {name}: left out, {', '.join(without)} did not run it"


def _refuse_or_note(difference: str, notes: list[str], allow_different: bool) -> None:
    if not allow_different:
        raise EvaluationError(f"{difference}: compare them with --allow-different, or run them alike")
    notes.append(f"{difference}: compared all the same")


def _compare_suite(
    runs: Sequence[Run], suite: str, settings: BootstrapParams, notes: list[str], allow_different: bool
) -> Comparison:
    summaries = [_of_student(run.summary(suite)) for run in runs]
    scores = [task_scores(summary).get(STUDENT, {}) for summary in summaries]
    notes += _missing(f"suite {suite}: task", {run.name: list(found) for run, found in zip(runs, scores, strict=True)})
    tasks = _common(list(found) for found in scores)
    types = {row["task"]: row["task_type"] for row in summaries[0].to_pylist() if row["task"] in tasks}
    instructions = [str(run.suite_manifest(suite)["params"].get("instructions")) for run in runs]
    for difference in _suite_differences(tasks, summaries, instructions):
        _refuse_or_note(f"suite {suite}: {difference}", notes, allow_different)
    first, *others = (
        {task: resample_task(task, run.unit_scores(suite, task), settings) for task in tasks} for run in runs
    )
    deltas: dict[tuple[int, str], Delta] = {}
    for index, other in enumerate(others, start=1):
        samples = {
            task: task_difference(task, scores[index][task] - scores[0][task], other[task], first[task])
            for task in tasks
        }
        for name, sample in with_means(samples, types).items():
            deltas[index, name] = delta_of(name, runs[index].name, sample, settings)
    values = {task: [found[task] for found in scores] for task in tasks}
    for mean, weights in mean_weights(types).items():
        values[mean] = [sum(weight * found[task] for task, weight in weights.items()) for found in scores]
    return _table(f"suite {suite}", runs, values, deltas)


def _suite_differences(
    tasks: Sequence[str], summaries: Sequence[pa.Table], instructions: Sequence[str]
) -> Iterator[str]:
    """What makes scores of the same tasks incomparable."""
    if len(set(instructions)) > 1:
        yield f"the instructions differ ({', '.join(value[:12] for value in instructions)})"
    for task in tasks:
        for column in ("data_revision", "mteb_version"):
            values = [str(summary.filter(pc.equal(summary["task"], task))[column][0]) for summary in summaries]
            if len(set(values)) > 1:
                yield f"{column.replace('_', ' ')} of {task} differs ({', '.join(values)})"


def _of_student(summary: pa.Table) -> pa.Table:
    return summary.filter(pc.equal(summary["system"], STUDENT))


def _compare_probe(
    runs: Sequence[Run], probe: str, settings: BootstrapParams, notes: list[str], allow_different: bool
) -> Comparison:
    params = [run.probe_manifest(probe)["params"] for run in runs]
    for key in ("settings", "instructions"):
        if any(found.get(key) != params[0].get(key) for found in params):
            _refuse_or_note(f"probe {probe}: its {key} differ", notes, allow_different)
    results = [run.probe_result(probe) for run in runs]
    scores = [_student_metrics(result["metrics"]) for result in results]
    values = {
        metric: [found[metric] for found in scores]
        for metric in scores[0]
        if all(isinstance(found.get(metric), int | float) for found in scores)
    }
    deltas = _probe_deltas(runs, probe, params[0]["settings"], settings, notes)
    apart = [metric for metric in values if metric in _TO_TARGETS]
    if apart and not _in_one_space(results):
        notes.append(f"probe {probe}: {', '.join(apart)} not compared, the runs measured it in other spaces")
    else:
        apart = []
    return _table(f"probe {probe}", runs, values, deltas, describe(probe).lower_is_better, apart)


def _in_one_space(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the cosines of all students are in the space of one teacher and transform, as far as the results say."""
    systems = [result.get("systems", {}) for result in results]
    if any(found.get(STUDENT, {}).get("space", _TEACHERS_SPACE) != _TEACHERS_SPACE for found in systems):
        return False
    teachers = [found["teacher"]["identity"] for found in systems if "teacher" in found]
    return all(
        other.get("transform") == teachers[0].get("transform")
        and teacher_difference(other, teachers[0], "the first run") is None
        for other in teachers[1:]
    )


def _student_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{STUDENT}/"
    return {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}


def _probe_deltas(
    runs: Sequence[Run], probe: str, params: Mapping[str, Any], settings: BootstrapParams, notes: list[str]
) -> dict[tuple[int, str], Delta]:
    """By run and metric; empty for a probe whose rows do not give intervals."""
    row_deltas = getattr(find_probe(probe), "row_deltas", None)
    if row_deltas is None:
        return {}
    deltas: dict[tuple[int, str], Delta] = {}
    first, *others = (run.probe_rows(probe) for run in runs)
    for index, rows in enumerate(others, start=1):
        if _same_units(first, rows):
            found = row_deltas({STUDENT: rows, runs[0].name: first}, params, settings)
            deltas |= {(index, delta.metric): delta for delta in found}
        else:
            notes.append(f"probe {probe}: no intervals, {runs[index].name} was measured on other texts")
    return deltas


def _same_units(first: pa.Table, other: pa.Table) -> bool:
    """Whether two tables of rows are about the same texts in the same order."""
    columns = [name for name in ("id", "query", "prompt") if name in first.column_names]
    return all(first[name].equals(other[name]) for name in columns)


def _table(
    name: str,
    runs: Sequence[Run],
    values: Mapping[str, Sequence[Any]],
    deltas: Mapping[tuple[int, str], Delta],
    lower: Sequence[str] = (),
    apart: Sequence[str] = (),
) -> Comparison:
    """`apart` are metrics whose scores stand beside one another without a difference."""
    rows = []
    for metric, found in values.items():
        # mteb gives NaN where a score is undefined.
        scores = [None if math.isnan(score) else score for score in found]
        cells = [Cell(scores[0])]
        for index, score in enumerate(scores[1:], start=1):
            delta = deltas.get((index, metric))
            if score is None or scores[0] is None or metric in apart:
                cells.append(Cell(score))
            elif delta is None:
                cells.append(Cell(score, score - scores[0]))
            else:
                cells.append(Cell(score, delta.delta, delta.low, delta.high, delta.verdict))
        summary = metric.startswith(("mean/", "type/"))
        rows.append(Row(metric, cells, summary, bool(lower) and metric.startswith(tuple(lower))))
    return Comparison(name, [run.name for run in runs], {}, {}, rows, [])
