"""Student minus every other system, with an interval for each task, task type and mean of a suite.

The queries, pairs or texts of each task are resampled independently; a mean combines the resamples of its tasks. Its
interval covers the uncertainty within the tasks, not the choice of the tasks.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.bootstrap import BootstrapParams, Delta, Sampled, combine, delta_of, sample_statistic
from pipeline.core.run import progress
from pipeline.evaluate.run import SystemResults
from pipeline.evaluate.summary import mean_weights, summary_table, task_scores
from pipeline.evaluate.unit_scores import Floats, UnitScores, as_counts

log = logging.getLogger(__name__)

DELTAS = pa.schema(
    [
        pa.field("metric", pa.string(), nullable=False),
        pa.field("system", pa.string(), nullable=False),
        pa.field("delta", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("units", pa.int64(), nullable=False),
    ]
)


def task_deltas(
    tasks: Sequence[Any], runs: Sequence[SystemResults], settings: BootstrapParams, metric: str | None = None
) -> list[Delta]:
    """Student minus each other system on each task, `type/<type>`, `mean/tasks` and `mean/types`.

    Empty without a student. `metric` is the compared score, None = each task's main score; only main scores get
    intervals.
    """
    student = next((run for run in runs if run.system == "student"), None)
    if student is None:
        return []
    scores = task_scores(summary_table(tasks, runs, metric))
    types = {task.metadata.name: task.metadata.type for task in tasks}
    ours = _resample(tasks, student, settings, metric)
    deltas: list[Delta] = []
    for run in (run for run in runs if run is not student):
        theirs = _resample(tasks, run, settings, metric)
        samples = {
            name: task_difference(name, scores["student"][name] - scores[run.system][name], ours[name], theirs[name])
            for name in types
        }
        deltas += [delta_of(name, run.system, sample, settings) for name, sample in with_means(samples, types).items()]
    return [delta for delta in deltas if not math.isnan(delta.delta)]


def sampled_mean(tasks: Sequence[Any], run: SystemResults, settings: BootstrapParams) -> Sampled:
    """A system's `mean/tasks`; equal settings draw the same units for every system, so replicates can be compared."""
    scores, parts = task_scores(summary_table(tasks, [run]))[run.system], _resample(tasks, run, settings, None)
    samples = {
        name: replace(part.score, value=scores[name]) if part else Sampled(scores[name], None, 0)
        for name, part in parts.items()
    }
    return with_means(samples, {task.metadata.name: task.metadata.type for task in tasks})["mean/tasks"]


def deltas_table(deltas: Iterable[Delta]) -> pa.Table:
    """In schema `DELTAS`."""
    return pa.Table.from_pylist([asdict(delta) for delta in deltas], schema=DELTAS)


@dataclass(frozen=True)
class Resampled:
    """A system's score on a task: on all units, and on resamples that are the same for every system."""

    keys: list[str]
    score: Sampled


def resample_task(name: str, parts: Sequence[UnitScores], settings: BootstrapParams) -> Resampled | None:
    """The score of a task from the unit scores of its splits and subsets; None without any."""
    if not parts:
        return None
    samples = [
        sample_statistic(f"{name}/{index}" if index else name, _on_resamples(part), part.units, settings)
        for index, part in enumerate(parts)
    ]
    return Resampled([part.key for part in parts], combine(samples, [1 / len(samples)] * len(samples)))


def task_difference(task: str, delta: float, first: Resampled | None, other: Resampled | None) -> Sampled:
    """The difference `delta` of two scores of a task, first minus other, with replicates where both have the units."""
    if first is None or other is None:
        return Sampled(delta, None, 0)
    if first.keys != other.keys:
        log.warning("%s: no interval: the systems were not measured on the same units", task)
        return Sampled(delta, None, 0)
    ours, theirs = first.score.replicates, other.score.replicates
    return Sampled(delta, None if ours is None or theirs is None else ours - theirs, first.score.units)


def with_means(samples: Mapping[str, Sampled], types: Mapping[str, str]) -> dict[str, Sampled]:
    """Differences by task, and their means by task type and over all; `types` has the type of each task."""
    means = {
        name: combine([samples[task] for task in weights], list(weights.values()))
        for name, weights in mean_weights(types).items()
    }
    return {**samples, **means}


def _resample(
    tasks: Sequence[Any], run: SystemResults, settings: BootstrapParams, metric: str | None
) -> dict[str, Resampled | None]:
    """By task; None where the score in question has no unit scores."""
    by_task = list(zip(tasks, run.unit_scores, strict=True))
    return {
        task.metadata.name: resample_task(
            task.metadata.name, parts if metric in (None, task.metadata.main_score) else [], settings
        )
        for task, parts in progress(by_task, total=len(by_task), desc=f"resamples of {run.system}", unit="task")
    }


def _on_resamples(part: UnitScores) -> Callable[[NDArray[np.int64]], Floats]:
    return lambda indices: part.scores(as_counts(indices))
