"""Quality of the trained teacher after MNTP and after SimCSE, against readings of its backbone that cost no training.

These are mean pooling, and the echo reading standardised over texts of the corpus.

On the tasks that params name, as the stage evaluate does; and without labels, on texts of the corpus (embeddings x, y
at length 1):

- anisotropy: mean cosine of different texts; near 1 all embeddings point one way,
- uniformity: log of the mean of exp(-2 |x - y|^2) over different texts; lower is more even (Wang and Isola 2020),
- alignment: mean of |x - y|^2 between the two halves of a text; lower is closer,
- halves: share of first halves whose nearest second half is their own.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.backbone.device import release_memory
from pipeline.core.errors import EvaluationError, TeacherError
from pipeline.core.vectors import unit_rows
from pipeline.evaluate.system import BareSystem, System
from pipeline.teach.params import QualityParams

if TYPE_CHECKING:
    from pipeline.embed.teachers.base import Teacher

log = logging.getLogger(__name__)

BASELINE, ECHO, MNTP, SIMCSE = "backbone-mean", "echo-standardized", "mntp", "simcse"
MEAN = "mean/tasks"
_UNTRAINED = {BASELINE: "mean pooling of its backbone", ECHO: "the standardised echo reading of its backbone"}
_AS_TEACHER = {
    BASELINE: "embed.teacher.kind backbone",
    ECHO: "embed.teacher.kind backbone, template echo, embed.transform.kind standardize",
}


@dataclass(frozen=True)
class Quality:
    """Measurements.

    Attributes:
        metrics: scores and means by `<system>/<task>`, as in the stage evaluate; empty without tasks.
        deltas: of each trained system against the untrained ones, with intervals.
        intrinsic: label-free metrics by system; empty if fewer than two texts can be halved.
    """

    metrics: dict[str, float]
    deltas: list[dict[str, Any]]
    intrinsic: dict[str, dict[str, float]]


def find_quality_tasks(params: QualityParams, local_dir: Path) -> list[Any]:
    """The mteb tasks of the params, local ones from `local_dir`; their instructions and data are checked.

    Raises EvaluationError if a task is unknown or has no instruction, or its data or folder cannot be loaded.
    """
    if not (params.local or params.tasks):
        log.warning("quality names no task: whether the teacher is better than mean pooling is not measured")
        return []
    from pipeline.tasks.availability import check_data
    from pipeline.tasks.instructions import load_instructions
    from pipeline.tasks.suites import find_tasks

    try:
        tasks = find_tasks([local_dir / name for name in params.local], params.tasks)
        load_instructions(None).check({task.metadata.name: task.metadata.type for task in tasks})
        check_data(tasks)
    except EvaluationError as error:
        error.argument = "quality"
        raise
    return tasks


def measure(
    teachers: "Mapping[str, Callable[[], Teacher]]",
    texts: Sequence[str],
    tasks: Sequence[Any],
    params: QualityParams,
    *,
    work: Path,
    dtype: str,
) -> Quality:
    """Load and measure one teacher after another, one in memory at a time; EvaluationError if embeddings are unusable.

    Args:
        teachers: load one, by system; they run in `dtype`.
        texts: of the corpus.
        tasks: see `find_quality_tasks`.
        work: folder of finished tasks.
    """
    halves = text_halves(texts, params.texts)
    intrinsic: dict[str, dict[str, float]] = {}

    def measured(name: str, teacher: "Teacher") -> System:
        if len(halves) > 1:
            intrinsic[name] = label_free_metrics(*(teacher.embed(side) for side in zip(*halves, strict=True)))
            log.info("%s: %s", name, intrinsic[name])
        return BareSystem(name, teacher.identity, teacher)

    def systems() -> Iterator[System]:
        for name, load in teachers.items():
            release_memory()
            try:
                system = measured(name, load())
            except TeacherError as error:
                if name != ECHO:
                    raise
                # A baseline that cannot be had, as of texts that it reads alike, must not cost the trained teacher.
                log.warning("%s is not measured: %s", name, str(error))
                continue
            yield system
            del system  # frees its memory before the next one is loaded

    if not tasks:
        deque(systems(), maxlen=0)
        return Quality({}, [], intrinsic)
    metrics, deltas = _on_tasks(systems(), tasks, params, work, dtype)
    return Quality(metrics, deltas, intrinsic)


def _on_tasks(
    systems: Iterator[System], tasks: Sequence[Any], params: QualityParams, work: Path, dtype: str
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    from pipeline.evaluate.deltas import task_deltas
    from pipeline.evaluate.run import run_systems
    from pipeline.evaluate.summary import flat_metrics, summary_table
    from pipeline.tasks.instructions import load_instructions

    runs = run_systems(systems, tasks, load_instructions(None), work=work, dtype=dtype)
    by_name = {run.system: run for run in runs}
    deltas = []
    for name in (MNTP, SIMCSE):
        others = [by_name[other] for other in _UNTRAINED if other in by_name]
        compared = [replace(by_name[name], system="student"), *others]
        deltas += [{**asdict(delta), "of": name} for delta in task_deltas(tasks, compared, params.bootstrap)]
    return flat_metrics(summary_table(tasks, runs)), deltas


def load_standardized(load: "Callable[[], Teacher]", texts: Sequence[str]) -> "Teacher":
    """The teacher that `load` gives, each dimension of its vectors standardised over those of `texts`."""
    from pipeline.core.target_transform import TransformParams
    from pipeline.embed.teachers.transformed import TransformedTeacher
    from pipeline.embed.transform_fit import fit_transform

    teacher = load()
    fitted = fit_transform(TransformParams(kind="standardize"), [teacher.embed(texts)], unit_length=False)
    return TransformedTeacher(teacher, fitted.transform)


def text_halves(texts: Sequence[str], most: int) -> list[tuple[str, str]]:
    """The halves, by words, of the first `most` texts that have four words."""
    long_enough = islice((words for text in texts if len(words := text.split()) >= 4), most)
    return [(" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])) for words in long_enough]


def label_free_metrics(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Anisotropy, uniformity, alignment and halves (see the module) of both halves, float32 `[N, d]`, N at least 2."""
    first, second = unit_rows(first), unit_rows(second)
    different = ~np.eye(len(first), dtype=bool)
    cosines, across = first @ first.T, first @ second.T
    # |x - y|^2 = 2 - 2 cos for vectors of length 1.
    measured = {
        "anisotropy": cosines[different].mean(),
        "uniformity": np.log(np.exp(4 * cosines[different] - 4).mean()),
        "alignment": (2 - 2 * np.diagonal(across)).mean(),
        "halves": (across.argmax(axis=1) == np.arange(len(first))).mean(),
    }
    return {name: round(float(value), 4) for name, value in measured.items()}


def worse_than_untrained(quality: Quality) -> str | None:
    """That the teacher scores below the better reading, in words; None if it does not, or was not measured."""
    scores = {name: quality.metrics[f"{name}/{MEAN}"] for name in _UNTRAINED if f"{name}/{MEAN}" in quality.metrics}
    ours, best = quality.metrics.get(f"{SIMCSE}/{MEAN}"), max(scores, key=lambda name: scores[name], default=None)
    if ours is None or best is None or ours >= scores[best]:
        return None
    found = (d for d in quality.deltas if (d["of"], d["metric"], d["system"]) == (SIMCSE, MEAN, best))
    between = "".join(f", interval {d['low']:+.4f} to {d['high']:+.4f}" for d in found if d["low"] is not None)
    return (
        f"the trained teacher scores {ours:.4f} on the tasks of teach.quality, {_UNTRAINED[best]} {scores[best]:.4f} "
        f"({ours - scores[best]:+.4f}{between}): train it longer or on more text, or take that reading as the teacher "
        f"({_AS_TEACHER[best]})"
    )
