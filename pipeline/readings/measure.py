"""Measures every reading of a backbone on tasks and on held-out rows, with intervals.

The states come from one pass per template over a sample of the training queries and their answers, the held-out rows
and the texts of the tasks. Standardisation and closed form are fitted on the training rows. All else is arithmetic on
stored states: settings are compared in seconds, and a second run reads what the first one computed.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.bootstrap import BootstrapParams, Sampled, delta_of, sample_statistic
from pipeline.core.target_transform import DECORRELATE, STANDARDIZE, TransformParams
from pipeline.core.vectors import rank_own
from pipeline.encoder.folder.config import ResponseForm
from pipeline.evaluate.deltas import sampled_mean
from pipeline.evaluate.embedding_cache import CachedSystem
from pipeline.evaluate.run import run_systems
from pipeline.evaluate.standardized import fit_standardization
from pipeline.evaluate.summary import summary_table, task_scores
from pipeline.readings.closed_form import fit_prediction, refine_prediction
from pipeline.readings.states import FrozenBackbone, TemplateStates
from pipeline.readings.systems import READINGS, ReadingSystem
from pipeline.tasks.instructions import Instructions
from pipeline.train.params import RefineParams

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Queries with the backbone's answers; without answers, `answers` is empty and nothing is predicted.

    Attributes:
        targets: of the answers `[N, e]`; None: the standardised echo reading of the answers.
        query_targets: of the queries `[N, e]`, by which readings are mapped to the targets' space; None: they are not.
    """

    queries: Sequence[str]
    answers: Sequence[str]
    targets: np.ndarray | None = None
    query_targets: np.ndarray | None = None


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its bootstrap interval; None without one."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, name: str, sampled: Sampled, settings: BootstrapParams) -> "Interval":
        drawn = delta_of(name, "", sampled, settings)
        return cls(drawn.delta, drawn.low, drawn.high)


@dataclass(frozen=True)
class Line:
    """One setting of one reading.

    Attributes:
        kind: raw, standardized, decorrelated, closed form or refined.
        share: of the predicted response; None for what predicts nothing.
        scores: main score of each task.
        mean: over the tasks; None without tasks.
        top1: share of held-out queries whose own answer is the nearest; None without held-out answers.
        gain: mean less that of the best reading without closed form, on the same resamples.
        ridge: strength of the closed form.
    """

    reading: str
    kind: str
    share: float | None
    scores: Mapping[str, float]
    mean: Interval | None
    top1: Interval | None
    gain: Interval | None
    ridge: float | None


@dataclass
class Measurement:
    """What decides a measurement besides the backbone and its texts.

    Attributes:
        tasks: of mteb, their data not loaded.
        shares: of the predicted response, each above 0 and at most 1.
        hidden_dir: where states are kept; `tasks_dir`: where the results of finished tasks are.
        refine: how the closed form is refined as well; None: it is not.
        form: how prediction and reading are joined at a share below 1.
        transform: of the echo targets, of kind standardize; if it decorrelates, of the decorrelated readings too.
        decorrelate_reading: the reading that is joined to the prediction has that transform as well, or `DECORRELATE`.
        seed, device: of the refinement.
        chunk_characters: of texts that a kill loses at most.
    """

    tasks: Sequence[Any]
    instructions: Instructions
    shares: Sequence[float]
    bootstrap: BootstrapParams
    dtype: str
    hidden_dir: Path
    tasks_dir: Path
    chunk_characters: int | None = None
    refine: RefineParams | None = None
    form: ResponseForm = "beside"
    transform: TransformParams = STANDARDIZE
    decorrelate_reading: bool = False
    seed: int = 0
    device: str = "cpu"


def measure(
    backbone: FrozenBackbone, names: Sequence[str], train: Rows, heldout: Rows, settings: Measurement
) -> list[Line]:
    """One line for each reading raw, standardised, decorrelated, and with each share of the closed form; by `names`.

    Raises:
        EvaluationError: a reading is the same for all training queries, the data of a task is missing, or a state is
            not finite.
    """
    with ExitStack() as stack:
        states = _States(backbone, settings, stack)
        targets = _targets(states, train, heldout, settings.transform)
        systems = [system for name in names for system in _systems(states, name, train, targets[0], settings)]
        top1 = {system.name: _top1(system, heldout, targets[1], settings.bootstrap) for system in systems}
        scores, means = _task_scores(systems, settings)
    bar = _best_untrained(systems, means)
    return [_line(system, scores.get(system.name, {}), means, top1, bar, settings.bootstrap) for system in systems]


class _States:
    """The states of templates, each opened when it is first needed."""

    def __init__(self, backbone: FrozenBackbone, settings: Measurement, stack: ExitStack) -> None:
        self._backbone, self._settings, self._stack = backbone, settings, stack
        self._open: dict[str, CachedSystem] = {}

    def system(self, name: str, **fitted: Any) -> ReadingSystem:
        """The reading `name`, with what was fitted for it."""
        return ReadingSystem(name, self._of(READINGS[name].template), **fitted)

    def _of(self, template: str) -> CachedSystem:
        if template not in self._open:
            log.info("reads with the template %s", template)
            cached = CachedSystem(
                TemplateStates(template, self._backbone),
                self._settings.hidden_dir,
                embeddings_dtype="float16",
                chunk_characters=self._settings.chunk_characters,
            )
            self._open[template] = self._stack.enter_context(closing(cached))
        return self._open[template]


def _targets(
    states: _States, train: Rows, heldout: Rows, transform: TransformParams
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Targets of the training and of the held-out answers; None where there are no answers."""
    if train.targets is not None or not train.answers:
        return train.targets, heldout.targets
    raw = states.system("echo")
    answers = raw.readings(train.answers, side="document")
    standardize = fit_standardization(answers, transform)
    return standardize(answers), standardize(
        raw.readings(heldout.answers, side="document")
    ) if heldout.answers else None


def _systems(
    states: _States, name: str, train: Rows, targets: np.ndarray | None, settings: Measurement
) -> Iterator[ReadingSystem]:
    raw = states.system(name)
    yield raw
    found = raw.readings(train.queries)
    standardize = fit_standardization(found)
    yield states.system(name, standardize=standardize)
    decorrelate = settings.transform if settings.transform.decorrelate else DECORRELATE
    yield states.system(name, standardize=fit_standardization(found, decorrelate))
    if targets is None:
        return
    readings = standardize(found)
    own = decorrelate if settings.decorrelate_reading else None
    predictions = [fit_prediction(readings, targets, settings.form, train.query_targets, own)]
    if settings.refine:
        arguments = (settings.refine, settings.seed, settings.device)
        predictions.append(refine_prediction(predictions[0], readings, targets, *arguments))
    for prediction in predictions:
        for share in settings.shares:
            yield states.system(name, standardize=standardize, prediction=prediction, share=share)


def _top1(
    system: ReadingSystem, heldout: Rows, targets: np.ndarray | None, settings: BootstrapParams
) -> Interval | None:
    if not heldout.answers:
        return None
    ranked = rank_own(system.encode(heldout.queries, ""), system.answers(heldout.answers, targets))
    hits = (ranked.ranks == 1).astype(np.float64)
    sampled = sample_statistic("top1", lambda rows: np.asarray(hits[rows].mean(axis=-1)), len(hits), settings)
    return Interval.of("top1", sampled, settings)


def _task_scores(
    systems: Sequence[ReadingSystem], settings: Measurement
) -> tuple[dict[str, dict[str, float]], dict[str, Sampled]]:
    """By system: the score of each task, and their mean on all units and on resamples."""
    if not settings.tasks:
        return {}, {}
    runs = run_systems(
        systems,
        settings.tasks,
        settings.instructions,
        work=settings.tasks_dir,
        dtype=settings.dtype,
    )
    scores = task_scores(summary_table(settings.tasks, runs))
    return scores, {run.system: sampled_mean(settings.tasks, run, settings.bootstrap) for run in runs}


def _best_untrained(systems: Sequence[ReadingSystem], means: Mapping[str, Sampled]) -> Sampled | None:
    untrained = [means[system.name] for system in systems if system.prediction is None and system.name in means]
    return max(untrained, key=lambda sampled: sampled.value, default=None)


def _line(
    system: ReadingSystem,
    scores: Mapping[str, float],
    means: Mapping[str, Sampled],
    top1: Mapping[str, Interval | None],
    bar: Sampled | None,
    settings: BootstrapParams,
) -> Line:
    mean = means.get(system.name)
    return Line(
        reading=system.reading,
        kind=system.kind,
        share=system.share if system.prediction else None,
        scores=scores,
        mean=None if mean is None else Interval.of("mean", mean, settings),
        top1=top1[system.name],
        gain=None if mean is None or bar is None else Interval.of("gain", _less(mean, bar), settings),
        ridge=system.prediction.ridge if system.prediction else None,
    )


def _less(ours: Sampled, theirs: Sampled) -> Sampled:
    """The difference of two means on the same resamples."""
    drawn = None
    if ours.replicates is not None and theirs.replicates is not None:
        drawn = ours.replicates - theirs.replicates
    return Sampled(ours.value - theirs.value, drawn, ours.units)
