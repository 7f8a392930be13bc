"""Scores as a table and as flat metrics, and the result files in mteb's own format."""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa

from pipeline.core.files import to_json
from pipeline.evaluate.run import SystemResults
from pipeline.evaluate.unit_scores import UNIT_SCORES_DIR, save

log = logging.getLogger(__name__)

SUMMARY = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("task_type", pa.string(), nullable=False),
        pa.field("system", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("main", pa.bool_(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("subset", pa.string(), nullable=False),
        pa.field("data_revision", pa.string(), nullable=False),
        pa.field("mteb_version", pa.string(), nullable=False),
    ]
)

_UNTRAINED = re.compile(r"untrained(?:-(standardized|decorrelated))?(-\d+)?/(.+)")


def summary_table(tasks: Sequence[Any], runs: Sequence[SystemResults], metric: str | None = None) -> pa.Table:
    """One row for each task, system, split, subset and score that mteb gives; NaN where a score is undefined.

    `metric` is the score marked `main`; None = each task's main score.
    """
    rows = [
        {
            "task": task.metadata.name,
            "task_type": task.metadata.type,
            "system": run.system,
            "metric": name,
            "main": name == (metric or task.metadata.main_score),
            "score": score,
            "split": split,
            "subset": scores["hf_subset"],
            "data_revision": result.dataset_revision,
            "mteb_version": result.mteb_version,
        }
        for run in runs
        for task, result in zip(tasks, run.results, strict=True)
        for split, subsets in result.scores.items()
        for scores in subsets
        for name, score in _numbers(task.metadata.main_score, scores)
    ]
    return pa.Table.from_pylist(rows, schema=SUMMARY)


def _numbers(main: str, scores: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """The scores that are numbers; the main one under its own name."""
    for name, value in {**scores, main: scores["main_score"]}.items():
        if name != "main_score" and isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


def task_scores(summary: pa.Table) -> dict[str, dict[str, float]]:
    """Each system's score of each task: the mean over its splits and subsets, as in mteb."""
    grouped: dict[str, dict[str, list[float]]] = {}
    for row in summary.select(["system", "task", "score", "main"]).to_pylist():
        if row["main"]:
            grouped.setdefault(row["system"], {}).setdefault(row["task"], []).append(row["score"])
    return {system: {task: fmean(scores) for task, scores in tasks.items()} for system, tasks in grouped.items()}


def flat_metrics(summary: pa.Table) -> dict[str, float]:
    """`<system>/<task>`, `<system>/type/<type>`, `<system>/mean/tasks` and `/mean/types`; `delta/`: student - teacher.

    `mean/tasks` weighs tasks equally, `mean/types` task types: Mean (Task) and Mean (TaskType) of mteb's leaderboard.
    As there, an undefined score makes its means undefined. Undefined metrics are left out and logged.
    """
    types = {row["task"]: row["task_type"] for row in summary.select(["task", "task_type"]).to_pylist()}
    by_system = task_scores(summary)
    for scores in by_system.values():
        for mean, weights in mean_weights(types).items():
            scores[mean] = sum(weight * scores[task] for task, weight in weights.items())
    metrics = {f"{system}/{key}": value for system, scores in by_system.items() for key, value in scores.items()}
    if {"student", "teacher"} <= set(by_system):
        student, teacher = by_system["student"], by_system["teacher"]
        metrics |= {f"delta/{key}": student[key] - teacher[key] for key in student}
    if undefined := [key for key, value in metrics.items() if math.isnan(value) and "/mean/" not in key]:
        log.warning("undefined, left out: %s", ", ".join(undefined))
    return {key: round(value, 6) for key, value in metrics.items() if not math.isnan(value)}


def mean_weights(types: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """The weight of each task in `type/<type>`, `mean/tasks` and `mean/types`, from the type of each task."""
    by_type: dict[str, list[str]] = {}
    for task, kind in types.items():
        by_type.setdefault(kind, []).append(task)
    weights = {f"type/{kind}": dict.fromkeys(tasks, 1 / len(tasks)) for kind, tasks in by_type.items()}
    weights["mean/tasks"] = dict.fromkeys(types, 1 / len(types))
    weights["mean/types"] = {task: 1 / (len(by_type) * len(tasks)) for tasks in by_type.values() for task in tasks}
    return weights


def seed_spread(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) of each metric over the untrained students; empty for a single seed.

    Metrics of standardised ones begin with `standardized/`, of decorrelated ones with `decorrelated/`.
    """
    values: dict[str, list[float]] = {}
    for key, value in metrics.items():
        if found := _UNTRAINED.fullmatch(key):
            values.setdefault(f"{found[1]}/{found[3]}" if found[1] else found[3], []).append(value)
    return {
        metric: {"mean": round(fmean(scores), 6), "std": round(stdev(scores), 6), "seeds": len(scores)}
        for metric, scores in values.items()
        if len(scores) > 1
    }


def write_unit_scores(folder: Path, tasks: Sequence[Any], runs: Sequence[SystemResults]) -> None:
    """Write `unit_scores/<task>.npz` of the student, from which `python -m pipeline compare` draws its intervals."""
    for run in (run for run in runs if run.system == "student"):
        for task, parts in zip(tasks, run.unit_scores, strict=True):
            if parts:
                save(folder / UNIT_SCORES_DIR / f"{task.metadata.name}.npz", parts)


def write_mteb_format(folder: Path, runs: Sequence[SystemResults]) -> None:
    """Write `results/<model>/<revision>/<task>.json` and `model_meta.json`, which `mteb.ResultCache(folder)` reads.

    Times and dates are left out, so that equal scores give equal files.
    """
    import mteb

    cache = mteb.ResultCache(folder)
    for run in runs:
        for result in run.results:
            path = cache.get_task_result_path(result.task_name, run.meta)
            path.parent.mkdir(parents=True, exist_ok=True)
            timeless = {"evaluation_time": None, "evaluation_phases": None, "date": None, "kg_co2_emissions": None}
            result.model_copy(update=timeless).to_disk(path)
            meta = json.loads(json.dumps(run.meta.to_dict(), default=str))
            (path.parent / "model_meta.json").write_text(to_json(meta), encoding="utf-8")
