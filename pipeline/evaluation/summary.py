"""Scores as a table and as flat metrics, and the result files in mteb's own format."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa

from pipeline.artifacts import to_json
from pipeline.evaluation.running import SystemResults

SUMMARY = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("task_type", pa.string(), nullable=False),
        pa.field("system", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("subset", pa.string(), nullable=False),
        pa.field("data_revision", pa.string(), nullable=False),
        pa.field("mteb_version", pa.string(), nullable=False),
    ]
)


def summary_table(tasks: Sequence[Any], runs: Sequence[SystemResults], metric: str | None = None) -> pa.Table:
    """One row for each task, system, split and subset, with the score of `metric` (None = the task's main score)."""
    rows = [
        {
            "task": task.metadata.name,
            "task_type": task.metadata.type,
            "system": run.system,
            "metric": metric or task.metadata.main_score,
            "score": float(scores[metric or "main_score"]),
            "split": split,
            "subset": scores["hf_subset"],
            "data_revision": result.dataset_revision,
            "mteb_version": result.mteb_version,
        }
        for run in runs
        for task, result in zip(tasks, run.results, strict=True)
        for split, subsets in result.scores.items()
        for scores in subsets
    ]
    return pa.Table.from_pylist(rows, schema=SUMMARY)


def task_scores(summary: pa.Table) -> dict[str, dict[str, float]]:
    """For each system, the score of each task: the mean over its splits and subsets, as mteb takes it."""
    grouped: dict[str, dict[str, list[float]]] = {}
    for row in summary.to_pylist():
        grouped.setdefault(row["system"], {}).setdefault(row["task"], []).append(row["score"])
    return {system: {task: fmean(scores) for task, scores in tasks.items()} for system, tasks in grouped.items()}


def flat_metrics(summary: pa.Table) -> dict[str, float]:
    """`<system>/<task>`, `<system>/type/<type>`, `<system>/mean/tasks` and `/mean/types`.

    `delta/...` is student - teacher. `mean/tasks` weighs each task alike, `mean/types` each task type.
    """
    types = {row["task"]: row["task_type"] for row in summary.select(["task", "task_type"]).to_pylist()}
    by_system = {system: _with_means(scores, types) for system, scores in task_scores(summary).items()}
    metrics = {f"{system}/{key}": value for system, scores in by_system.items() for key, value in scores.items()}
    if {"student", "teacher"} <= set(by_system):
        student, teacher = by_system["student"], by_system["teacher"]
        metrics |= {f"delta/{key}": student[key] - teacher[key] for key in student}
    return {key: round(value, 6) for key, value in metrics.items()}


def _with_means(scores: dict[str, float], types: dict[str, str]) -> dict[str, float]:
    by_type: dict[str, list[float]] = {}
    for task, score in scores.items():
        by_type.setdefault(types[task], []).append(score)
    type_means = {kind: fmean(values) for kind, values in by_type.items()}
    return {
        **scores,
        **{f"type/{kind}": value for kind, value in type_means.items()},
        "mean/tasks": fmean(scores.values()),
        "mean/types": fmean(type_means.values()),
    }


def write_mteb_format(folder: Path, runs: Sequence[SystemResults]) -> None:
    """`results/<model>/<revision>/<task>.json` and `model_meta.json`, which `mteb.ResultCache(folder)` reads.

    Times and dates are left out: equal scores give equal files.
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
