"""Run systems on mteb tasks, keeping every finished task.

Finished tasks live in a result cache of mteb, one for each version of a task's data and of mteb; in it, the model's
revision stands for the weights, the instructions and the precision. So a killed run goes on where it stopped, a
retrained student does not rerun its teacher, and a changed data set reruns that task alone. What a task found for each
query or text lies beside its result and is written first: a result without it, or half of one, is run again.
"""

import copy
import logging
import math
import random
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.artifacts import digest_of
from pipeline.core.errors import EvaluationError
from pipeline.evaluate.mteb_adapter import MtebEncoder, published_meta
from pipeline.evaluate.mteb_observer import Observer
from pipeline.evaluate.system import System, failures
from pipeline.evaluate.unit_scores import Findings, load, save
from pipeline.tasks.availability import check_data
from pipeline.tasks.instructions import Instructions

log = logging.getLogger(__name__)

SEED = 42
FINDINGS_VERSION = 1  # raise it when findings are taken otherwise: finished tasks are then run again


@dataclass(frozen=True)
class SystemResults:
    """One system's mteb results, in the order of the tasks.

    Attributes:
        meta: mteb's ModelMeta, with the name and revision that the results are published under.
        results: mteb's TaskResult of each task.
        findings: of each task, for each of its splits and subsets; empty where they do not give its score.
        computed: tasks that were run now and not taken from finished work.
    """

    system: str
    identity: dict[str, Any]
    prompting: str
    meta: Any
    results: list[Any] = field(default_factory=list)
    findings: list[list[Findings]] = field(default_factory=list)
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
    model_name: str | None = None,
) -> list[SystemResults]:
    """Every system on every task.

    Args:
        systems: taken one by one, and not kept.
        tasks: mteb tasks whose data is not loaded; each system runs on fresh copies, so all see the same samples.
        instructions: must cover every task.
        work: where finished tasks are kept.
        batch_size: texts that mteb hands over at once.
        dtype: the systems' precision.
        model_name: under which the student's results are published, `organisation/name`.

    Raises:
        EvaluationError: data sets or instructions are missing (all of them in one message), or embeddings are unusable.
    """
    import datasets

    datasets.disable_progress_bars()
    instructions.check({task.metadata.name: task.metadata.type for task in tasks})
    available: set[str] = set()
    runs = []
    for system in systems:
        runs.append(_run_system(system, tasks, instructions, work, batch_size, dtype, model_name, available))
        del system  # else it would stay in memory while the next one is loaded
    return _told_apart(runs)


def _run_system(
    system: System,
    tasks: Sequence[Any],
    instructions: Instructions,
    work: Path,
    batch_size: int,
    dtype: str,
    model_name: str | None,
    available: set[str],
) -> SystemResults:
    encoder = MtebEncoder(system, instructions, dtype=dtype)
    finished = [[_Finished.of(part, work, encoder) for part in _parts(task)] for task in tasks]
    pending = [task for task, parts in zip(tasks, finished, strict=True) if any(part.result is None for part in parts)]
    if unseen := [task for task in pending if task.metadata.name not in available]:
        check_data(unseen)
    available.update(task.metadata.name for task in pending)
    started = time.monotonic()
    meta = published_meta(system, model_name)
    run = SystemResults(system.name, system.identity, system.prompting, meta, computed=len(pending))
    for task, parts in zip(tasks, finished, strict=True):
        for part in parts:
            if part.result is None:
                part.run(encoder, batch_size)
        result, findings = _combined(task, parts)
        run.results.append(result)
        run.findings.append(findings)
        log.info("%s, %s: %.4f", system.name, task.metadata.name, result.get_score())
    return replace(run, seconds=round(time.monotonic() - started, 2))


@dataclass
class _Finished:
    """One task of mteb (no aggregate) and its finished work for one system."""

    task: Any
    cache: Any
    meta: Any
    result: Any = None
    findings: list[Findings] = field(default_factory=list)

    @classmethod
    def of(cls, task: Any, work: Path, encoder: MtebEncoder) -> "_Finished":
        """What there is of a task; a half-written result is deleted, and said so."""
        found = cls(task, _cache(work, task), encoder.mteb_model_meta)
        name = task.metadata.name
        try:
            result = found.cache.load_task_result(name, found.meta)
        except ValueError:
            log.warning("%s is damaged: running %s again", found.path, name)
            found.path.unlink()
            return found
        if result is None or result.get_missing_evaluations(task):
            return found
        findings = load(found.findings_path)
        if findings is None:
            log.warning("%s is missing or damaged: running %s again", found.findings_path, name)
            return found
        found.result, found.findings = result, findings
        return found

    @property
    def path(self) -> Path:
        return Path(self.cache.get_task_result_path(self.task.metadata.name, self.meta))

    @property
    def findings_path(self) -> Path:
        return self.path.with_suffix(".findings.npz")

    def run(self, encoder: MtebEncoder, batch_size: int) -> None:
        """Run it and keep what it gives, unless the system failed on some texts: then the next run runs it again.

        Raises:
            EvaluationError: mteb gives no result.
        """
        task = copy.deepcopy(self.task)  # a task's random state moves as it runs
        task.load_data()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        failed = failures(encoder.system)
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=".predictions-") as folder:
            observer = Observer(task, Path(folder))
            result = _evaluate(encoder, task, batch_size, observer.prediction_folder)
            self.findings = observer.findings(result)
        save(self.findings_path, self.findings)
        self.cache.save_to_cache(result, self.meta)
        # As the next run will read it: mteb rounds scores when it writes them.
        self.result = self.cache.load_task_result(task.metadata.name, self.meta)
        if failed != failures(encoder.system):
            self.path.unlink()


def _evaluate(encoder: MtebEncoder, task: Any, batch_size: int, prediction_folder: Path | None) -> Any:
    import mteb
    from scipy.stats import ConstantInputWarning
    from sklearn.exceptions import ConvergenceWarning, UndefinedMetricWarning

    _seed_everything()
    with warnings.catch_warnings():
        # A weak system leaves classes unpredicted or embeds all texts alike, and mteb caps its classifiers' steps: that
        # belongs to the score.
        for category in (UndefinedMetricWarning, ConvergenceWarning, ConstantInputWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "To copy construct from a tensor")  # mteb's own, on bitext mining
        outcome = mteb.evaluate(
            encoder,
            task,
            cache=None,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            prediction_folder=prediction_folder,
            show_progress_bar=False,
            co2_tracker=False,
        )
    if not outcome.task_results:
        reason = outcome.exceptions[0].exception if outcome.exceptions else "mteb gave no result"
        raise EvaluationError(f"task '{task.metadata.name}': {reason}")
    return outcome.task_results[0]


def _parts(task: Any) -> list[Any]:
    """An aggregate's tasks, each with finished work of its own; else the task."""
    return list(getattr(task.metadata, "tasks", None) or [task])


def _combined(task: Any, parts: Sequence[_Finished]) -> tuple[Any, list[Findings]]:
    results = [part.result for part in parts]
    result = task.combine_task_results(results) if getattr(task.metadata, "tasks", None) else results[0]
    findings = [found for part in parts for found in part.findings]
    # The deltas take a task's score as the mean over splits and subsets, as mteb does unless a task knows better.
    whole = all(part.findings for part in parts) and math.isclose(
        np.mean([found.score() for found in findings]), result.get_score(), abs_tol=1e-4
    )
    return result, findings if whole else []


def _told_apart(runs: list[SystemResults]) -> list[SystemResults]:
    """Results that would be published under one name and revision get the name of their system behind it."""
    taken: set[tuple[str, str]] = set()
    told = []
    for run in runs:
        meta = run.meta
        if (meta.name, meta.revision) in taken:
            meta = meta.model_copy(update={"name": f"{meta.name}-{run.system}"})
        taken.add((meta.name, meta.revision))
        told.append(replace(run, meta=meta))
    return told


def _cache(work: Path, task: Any) -> Any:
    import mteb

    key = digest_of(
        {
            "data": [[task.metadata.name, str(task.metadata.dataset)]],
            "splits": [list(task.eval_splits), list(task.hf_subsets)],
            "mteb": mteb.__version__,
            "seed": SEED,
            "findings": FINDINGS_VERSION,
        }
    )
    return mteb.ResultCache(work / key[:16])


def _seed_everything() -> None:
    """mteb's tasks carry seeds of their own; a few draw from the global generators as well."""
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
