"""Runs systems on mteb tasks and reuses every finished task.

Finished tasks lie in a result cache of mteb, one for each version of a task's data and of mteb; the model's revision
stands for weights, instructions and precision. A task's unit scores and the digests of both lie beside its result and
are written first: a result without them, or a damaged one, is computed again.
"""

import copy
import json
import logging
import math
import random
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.errors import EvaluationError
from pipeline.core.files import bytes_sha256, digest_of, disk_errors, file_sha256, write_bytes, write_json
from pipeline.core.folders import scratch_beside
from pipeline.evaluate.mteb_adapter import MtebEncoder, published_meta
from pipeline.evaluate.mteb_observer import Observer
from pipeline.evaluate.system import System, failed_texts
from pipeline.evaluate.unit_scores import UnitScores, load, save
from pipeline.tasks.availability import check_data
from pipeline.tasks.instructions import Instructions

log = logging.getLogger(__name__)

SEED = 42
LOADER_TEXTS = 256  # that mteb's loader joins; a system gets the texts of all of them at once
UNIT_SCORES_VERSION = 1  # raise it when unit scores are computed otherwise: finished tasks are then run again


@dataclass(frozen=True)
class SystemResults:
    """One system's mteb results, in the order of the tasks.

    Attributes:
        meta: mteb's ModelMeta, with the name and revision that the results are published under.
        results: mteb's TaskResult of each task.
        unit_scores: of each task, for each split and subset; empty where they do not reproduce its score.
        computed: tasks that this run computed; the others were finished before.
    """

    system: str
    identity: dict[str, Any]
    prompting: str
    meta: Any
    results: list[Any] = field(default_factory=list)
    unit_scores: list[list[UnitScores]] = field(default_factory=list)
    computed: int = 0
    seconds: float = 0.0


def run_systems(
    systems: Iterable[System],
    tasks: Sequence[Any],
    instructions: Instructions,
    *,
    work: Path,
    dtype: str,
    model_name: str | None = None,
) -> list[SystemResults]:
    """Run every system on every task; no system is referenced after its turn.

    The data of `tasks` is not loaded; each system runs on fresh copies, so all see the same samples. Finished tasks lie
    in `work`; `model_name` (`organisation/name`) is the student's in its results.

    Raises EvaluationError if data sets or instructions are missing (all in one message), or embeddings are unusable.
    """
    import datasets

    datasets.disable_progress_bars()
    instructions.check({task.metadata.name: task.metadata.type for task in tasks})
    available: set[str] = set()
    runs = []
    for system in systems:
        meta, encoder = published_meta(system, model_name), MtebEncoder(system, instructions, dtype=dtype)
        runs.append(_run_system(encoder, meta, tasks, work, available))
        del system, encoder  # frees its memory before the next one is loaded
    return _with_unique_names(runs)


def _run_system(
    encoder: MtebEncoder, meta: Any, tasks: Sequence[Any], work: Path, available: set[str]
) -> SystemResults:
    started, system = time.monotonic(), encoder.system
    task_runs = [[_TaskRun.find(part, work, encoder) for part in _parts(task)] for task in tasks]
    pending = [task for task, parts in zip(tasks, task_runs, strict=True) if any(part.result is None for part in parts)]
    if unchecked := [task for task in pending if task.metadata.name not in available]:
        check_data(unchecked)
    available.update(task.metadata.name for task in pending)
    results, unit_scores = [], []
    for task, parts in zip(tasks, task_runs, strict=True):
        for part in parts:
            if part.result is None:
                part.run(encoder)
        result, scores = _combined(task, parts)
        results.append(result)
        unit_scores.append(scores)
        log.info("%s, %s: %.4f", system.name, task.metadata.name, result.get_score())
    seconds = round(time.monotonic() - started, 2)
    return SystemResults(
        system.name, system.identity, system.prompting, meta, results, unit_scores, len(pending), seconds
    )


@dataclass
class _TaskRun:
    """One task of mteb (no aggregate) and one system's finished work on it."""

    task: Any
    cache: Any
    meta: Any
    result: Any = None
    unit_scores: list[UnitScores] = field(default_factory=list)

    @classmethod
    def find(cls, task: Any, work: Path, encoder: MtebEncoder) -> "_TaskRun":
        """The finished work on a task; a damaged result is deleted with a warning."""
        found, name = cls(task, _cache(work, task), encoder.mteb_model_meta), task.metadata.name
        if (damaged := found._damaged()) is not None:
            log.warning("%s is damaged: running %s again", damaged, name)
            return found
        try:
            result = found.cache.load_task_result(name, found.meta)
        except ValueError:
            log.warning("%s is damaged: running %s again", found.path, name)
            found.path.unlink()
            return found
        if result is None or result.get_missing_evaluations(task):
            return found
        unit_scores = load(found.unit_scores_path)
        if unit_scores is None:
            log.warning("%s is missing or damaged: running %s again", found.unit_scores_path, name)
            return found
        found.result, found.unit_scores = result, unit_scores
        return found

    @property
    def path(self) -> Path:
        return Path(self.cache.get_task_result_path(self.task.metadata.name, self.meta))

    @property
    def unit_scores_path(self) -> Path:
        return self.path.with_suffix(".findings.npz")

    def run(self, encoder: MtebEncoder) -> None:
        """Run the task and store its result, unless the system failed on some texts: then the next run repeats it."""
        if hasattr(encoder.system, "calibrate"):
            encoder.system.calibrate(lambda: _evaluate(encoder, self._loaded(), None))
        task = self._loaded()
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            failed = failed_texts(encoder.system)
            with scratch_beside(self.path) as folder:
                observer = Observer(task, folder)
                result = _evaluate(encoder, task, observer.prediction_folder)
                self.unit_scores = observer.unit_scores(result)
                written = folder / self.path.name
                result.to_disk(written)
                # As the next run will read it: mteb rounds scores when it writes them.
                self.result, content = type(result).from_disk(written), written.read_bytes()
        if failed == failed_texts(encoder.system):
            self._store(content)

    def _loaded(self) -> Any:
        """A copy of the task with its data: a task's random state moves as it runs."""
        task = copy.deepcopy(self.task)
        task.load_data()
        return task

    def _store(self, content: bytes) -> None:
        """Write the unit scores, the digests, and last the result in mteb's format."""
        save(self.unit_scores_path, self.unit_scores)
        digests = {"result": bytes_sha256(content), "unit_scores": file_sha256(self.unit_scores_path)}
        write_json(self._digests_path, digests)
        write_bytes(self.path, content)

    @property
    def _digests_path(self) -> Path:
        return self.path.with_suffix(".digests.json")

    def _damaged(self) -> Path | None:
        """The file of a finished task that has not its recorded digest; those of earlier versions have none."""
        files = {"result": self.path, "unit_scores": self.unit_scores_path}
        if not all(file.is_file() for file in (*files.values(), self._digests_path)):
            return None
        try:
            recorded = json.loads(self._digests_path.read_bytes())
            differing = [file for name, file in files.items() if file_sha256(file) != recorded[name]]
        except (ValueError, KeyError, TypeError):
            return self._digests_path
        return differing[0] if differing else None


def _evaluate(encoder: MtebEncoder, task: Any, prediction_folder: Path | None) -> Any:
    import mteb
    from scipy.stats import ConstantInputWarning
    from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning

    _seed_everything()
    with warnings.catch_warnings():
        # Causes that belong to the score: a weak system leaves classes unpredicted or embeds all texts alike, and mteb
        # caps its classifiers' steps.
        for category in (UndefinedMetricWarning, ConvergenceWarning, ConstantInputWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "To copy construct from a tensor")  # mteb's own, on bitext mining
        outcome = mteb.evaluate(
            encoder,
            task,
            cache=None,
            encode_kwargs={"batch_size": LOADER_TEXTS, "show_progress_bar": False},
            prediction_folder=prediction_folder,
            show_progress_bar=False,
            co2_tracker=False,
        )
    if not outcome.task_results:
        reason = outcome.exceptions[0].exception if outcome.exceptions else "mteb gave no result"
        raise EvaluationError(f"task '{task.metadata.name}': {reason}")
    return outcome.task_results[0]


def _parts(task: Any) -> list[Any]:
    """The tasks of an aggregate, whose finished work is stored separately; else the task itself."""
    return list(getattr(task.metadata, "tasks", None) or [task])


def _combined(task: Any, parts: Sequence[_TaskRun]) -> tuple[Any, list[UnitScores]]:
    results = [part.result for part in parts]
    result = task.combine_task_results(results) if getattr(task.metadata, "tasks", None) else results[0]
    unit_scores = [scores for part in parts for scores in part.unit_scores]
    # The deltas take a task's score as the mean over splits and subsets; some tasks of mteb define another one.
    is_mean = all(part.unit_scores for part in parts) and math.isclose(
        np.mean([scores.score() for scores in unit_scores]), result.get_score(), abs_tol=1e-4
    )
    return result, unit_scores if is_mean else []


def _with_unique_names(runs: list[SystemResults]) -> list[SystemResults]:
    """Appends the system to the published name of results whose name and revision another system has already."""
    taken: set[tuple[str, str]] = set()
    unique = []
    for run in runs:
        meta = run.meta
        if (meta.name, meta.revision) in taken:
            meta = meta.model_copy(update={"name": f"{meta.name}-{run.system}"})
        taken.add((meta.name, meta.revision))
        unique.append(replace(run, meta=meta))
    return unique


def _cache(work: Path, task: Any) -> Any:
    import mteb

    key = digest_of(
        {
            "data": [[task.metadata.name, str(task.metadata.dataset)]],
            "splits": [list(task.eval_splits), list(task.hf_subsets)],
            "mteb": mteb.__version__,
            "seed": SEED,
            "findings": UNIT_SCORES_VERSION,
        }
    )
    with disk_errors(work):
        return mteb.ResultCache(work / key[:16])


def _seed_everything() -> None:
    """mteb's tasks have seeds of their own, but a few also draw from the global generators."""
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
