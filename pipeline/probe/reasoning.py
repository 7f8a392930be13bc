"""Retrieval that takes reasoning: nDCG@10 on BRIGHT tasks of mteb, or on local folders of retrieval or choices.

Passages that a query must not find are left out of its ranking (BRIGHT; `top_ranked` of a local folder). Questions with
choices (as ARC's) search the choices of all questions; `choice_accuracy/<task>` is how often the right choice is the
nearest of the question's own.
"""

from typing import Any, Self

import pyarrow as pa
from pydantic import Field, model_validator

from pipeline.core.config import Params
from pipeline.core.errors import EvaluationError, section
from pipeline.evaluate.deltas import task_deltas
from pipeline.evaluate.run import run_systems
from pipeline.evaluate.summary import flat_metrics, summary_table
from pipeline.probe.base import ProbeContext, ProbeResult
from pipeline.probe.descriptions import Description
from pipeline.tasks.choices import CHOICE_ACCURACY
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.suites import find_tasks

METRIC = "ndcg_at_10"


class ReasoningParams(Params):
    """Which retrieval tasks: at least one."""

    local: list[str] = Field(default_factory=list, description="folders under evaluate.local_dir")
    tasks: list[str] = Field(default_factory=list, description="mteb task names, e.g. BrightBiologyRetrieval")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not (self.local or self.tasks):
            raise ValueError("names no task: fill local or tasks")
        return self


PARAMS = ReasoningParams
DESCRIPTION = Description(
    note="nDCG@10 of each task; choice_accuracy: how often the right choice is the nearest of the question's "
    "own. gain percent: student over teacher, of the mean over tasks."
)


def run(params: ReasoningParams, context: ProbeContext) -> ProbeResult:
    """Run every system on every task; raises EvaluationError if one is unknown, is no retrieval, or has no data."""
    tasks = find_tasks([context.local_dir / name for name in params.local], params.tasks)
    _check_retrieval(tasks)
    with section("evaluate"):
        runs = run_systems(
            context.build(),
            tasks,
            load_instructions(context.instructions),
            work=context.work,
            dtype=context.dtype,
        )
    rows = summary_table(tasks, runs, METRIC)
    metrics: dict[str, Any] = flat_metrics(rows) | choice_metrics(rows)
    teacher, student = metrics.get("teacher/mean/tasks"), metrics.get("student/mean/tasks")
    if teacher and student is not None:
        metrics["gain_percent"] = round(100 * (student - teacher) / teacher, 2)
    systems = {run.system: {"identity": run.identity, "prompting": run.prompting} for run in runs}
    deltas = task_deltas(tasks, runs, context.bootstrap, METRIC)
    return ProbeResult(metrics, rows, systems, deltas=deltas)


def choice_metrics(rows: pa.Table) -> dict[str, float]:
    """`<system>/choice_accuracy/<task>` of the tasks with choices; others have no such score."""
    return {
        f"{row['system']}/{CHOICE_ACCURACY}/{row['task']}": round(row["score"], 6)
        for row in rows.to_pylist()
        if row["metric"] == CHOICE_ACCURACY
    }


def _check_retrieval(tasks: list[Any]) -> None:
    others = [f"{task.metadata.name} ({task.metadata.type})" for task in tasks if task.metadata.type != "Retrieval"]
    if others:
        raise EvaluationError(f"the probe reasoning takes retrieval tasks only, not {', '.join(others)}")
