"""Run systems on mteb tasks, keeping every finished task.

Finished tasks live in a result cache of mteb, one for each version of a task's data and of mteb; in it, the model's
revision stands for the weights, the instructions and the precision. So a killed run goes on where it stopped, a
retrained student does not rerun its teacher, and a changed data set reruns that task alone.
"""

import copy
import logging
import random
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import digest_of
from pipeline.errors import EvaluationError, PipelineError
from pipeline.evaluation.instructions import Instructions
from pipeline.evaluation.mteb_adapter import MtebEncoder
from pipeline.evaluation.systems import System

log = logging.getLogger(__name__)

SEED = 42


@dataclass(frozen=True)
class SystemResults:
    """One system's mteb results, in the order of the tasks.

    Attributes:
        meta: mteb's ModelMeta, with the name and revision that the results are filed under.
        results: mteb's TaskResult of each task.
        computed: tasks that were run now and not taken from finished work.
    """

    system: str
    identity: dict[str, Any]
    prompting: str
    meta: Any
    results: list[Any] = field(default_factory=list)
    computed: int = 0
    seconds: float = 0.0


def run_systems(
    systems: Iterable[System],
    tasks: Sequence[Any],
    instructions: Instructions,
    *,
    work: Path,
    batch_size: int,
    dtype: str,
) -> list[SystemResults]:
    """Every system on every task.

    Args:
        systems: taken one by one, and not kept.
        tasks: mteb tasks whose data is not loaded; each system runs on fresh copies, so all see the same samples.
        instructions: must cover every task.
        work: where finished tasks are kept.
        batch_size: texts that mteb hands over at once.
        dtype: the systems' precision.

    Raises:
        EvaluationError: data sets or instructions are missing (all of them in one message), or embeddings are unusable.
    """
    import datasets

    datasets.disable_progress_bars()
    for task in tasks:
        instructions.choose(task.metadata.name, task.metadata.type, "query")
    available: set[str] = set()
    return [_run_system(system, tasks, instructions, work, batch_size, dtype, available) for system in systems]


def _run_system(
    system: System,
    tasks: Sequence[Any],
    instructions: Instructions,
    work: Path,
    batch_size: int,
    dtype: str,
    available: set[str],
) -> SystemResults:
    encoder = MtebEncoder(system, instructions, dtype=dtype)
    caches = [_cache(work, task) for task in tasks]
    pending = [
        task.metadata.name for task, cache in zip(tasks, caches, strict=True) if not _is_finished(task, cache, encoder)
    ]
    _check_data([task for task in tasks if task.metadata.name in set(pending) - available])
    available.update(pending)
    started, results = time.monotonic(), []
    for task, cache in zip(tasks, caches, strict=True):
        results.append(_run_task(encoder, task, cache, batch_size))
        log.info("%s, %s: %.4f", system.name, task.metadata.name, results[-1].get_score())
    seconds = round(time.monotonic() - started, 2)
    meta = encoder.mteb_model_meta
    return SystemResults(system.name, system.identity, system.prompting, meta, results, len(pending), seconds)


def _run_task(encoder: MtebEncoder, task: Any, cache: Any, batch_size: int) -> Any:
    import mteb
    from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning

    _seed_everything()
    with warnings.catch_warnings():
        # A weak system leaves classes unpredicted, and mteb caps its classifiers' steps: both belong to the score.
        for category in (UndefinedMetricWarning, ConvergenceWarning):
            warnings.simplefilter("ignore", category)
        outcome = mteb.evaluate(
            encoder,
            copy.deepcopy(task),  # a task's random state moves as it runs
            cache=cache,
            overwrite_strategy="only-missing",
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            show_progress_bar=False,
            co2_tracker=False,
        )
    if not outcome.task_results:
        reason = outcome.exceptions[0].exception if outcome.exceptions else "mteb gave no result"
        raise EvaluationError(f"task '{task.metadata.name}': {reason}")
    return outcome.task_results[0]


def _cache(work: Path, task: Any) -> Any:
    import mteb

    parts = getattr(task.metadata, "tasks", None) or [task]
    key = digest_of(
        {
            "data": [[part.metadata.name, str(part.metadata.dataset)] for part in parts],
            "splits": [list(task.eval_splits), list(task.hf_subsets)],
            "mteb": mteb.__version__,
            "seed": SEED,
        }
    )
    return mteb.ResultCache(work / key[:16])


def _is_finished(task: Any, cache: Any, encoder: MtebEncoder) -> bool:
    """Whether all of a task is in the cache; a half-written result is deleted, and said so."""
    name, meta = task.metadata.name, encoder.mteb_model_meta
    try:
        result = cache.load_task_result(name, meta)
    except ValueError:
        path = cache.get_task_result_path(name, meta)
        log.warning("%s is damaged: running %s again", path, name)
        path.unlink()
        return False
    return result is not None and not result.get_missing_evaluations(task)


def _check_data(tasks: Sequence[Any]) -> None:
    missing = [f"  {task.metadata.name}: {problem}" for task in tasks if (problem := _data_problem(task))]
    if missing:
        raise EvaluationError(
            f"the data of {len(missing)} of {len(tasks)} tasks cannot be loaded (offline, or not in the local cache "
            "of data sets):\n" + "\n".join(missing)
        )


def _data_problem(task: Any) -> str | None:
    try:
        for part in getattr(task.metadata, "tasks", None) or [task]:
            copy.deepcopy(part).load_data()
    except PipelineError as error:
        return str(error)
    except (OSError, ValueError, KeyError) as error:
        return f"{task.metadata.dataset.get('path')}: {str(error).splitlines()[0]}"
    return None


def _seed_everything() -> None:
    """mteb's tasks carry seeds of their own; a few draw from the global generators as well."""
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
