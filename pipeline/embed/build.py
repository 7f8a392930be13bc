"""An embedder from params, and the transform of its targets, fitted on the vectors that it stored."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.backbone.device import best_device
from pipeline.core.gates import warn_of_gates
from pipeline.core.row_store import ShardStore
from pipeline.core.run import progress
from pipeline.core.tracking import Log, ProgressLog
from pipeline.core.vectors import Anisotropy
from pipeline.embed.params import EmbedParams, TargetGates
from pipeline.embed.statistics import CAUSES, TargetStatistics
from pipeline.embed.targets import Embedder, Finish, UsableResponses, among
from pipeline.embed.teachers.base import Teacher
from pipeline.embed.teachers.pool import ParallelTeacher
from pipeline.embed.transform_fit import Fitted, fit_transform
from pipeline.optim.batching import CHARACTERS_PER_TOKEN, token_budget

log = logging.getLogger(__name__)

BATCH_ROWS = 4096
# Mean cosine of two answers from which `auto` standardises: on the readings of docs/targets.md, .33 to .80, that gained
# up to .08 and never cost more than .005.
ANISOTROPIC = 0.3
# What a teacher gets at once: about so many batches, at most so many texts. It sorts them by length, a kill loses them.
CHUNK_BATCHES = 16
CHUNK_TEXTS = 4096


def make_embedder(
    store: ShardStore, teacher: Teacher, params: EmbedParams, log_progress: Log | None = None
) -> Embedder:
    """An Embedder that gives each process of the teacher enough texts at once, and warns of `gates` early."""
    processes = teacher.processes if isinstance(teacher, ParallelTeacher) else 1
    tokens = CHUNK_BATCHES * token_budget(params.teacher.batch_tokens, best_device()) * processes
    return Embedder(
        store,
        teacher,
        CHUNK_TEXTS * processes,
        tokens * CHARACTERS_PER_TOKEN,
        look=partial(_warn, params.gates),
        track=ProgressLog(log_progress),
    )


def make_finish(
    embedder: Embedder, responses: UsableResponses, trained_on: Iterable[str], params: EmbedParams
) -> tuple[Finish, dict[str, Any]]:
    """From stored vectors to targets, and the facts of the transform for results/.

    `transform`, if there is one, is fitted on the rows whose ids are `trained_on`; both responses and ids are sorted by
    id. Raises TeacherError if it cannot be fitted on them.
    """
    if params.transform.kind == "none":
        return Finish(params.normalize, params.dtype), {"kind": "none"}
    fitted = _fit(embedder, responses, trained_on, params)
    if params.transform.kind == "auto":
        found = fitted.facts["anisotropy_before"]
        chosen = "standardize" if found > ANISOTROPIC else "none"
        log.info("embed.transform: auto is %s, the anisotropy is %s (limit %s)", chosen, found, ANISOTROPIC)
        if chosen == "none":
            return Finish(params.normalize, params.dtype), {"kind": "none", "anisotropy_before": found}
    log.info("embed.transform: %s", fitted.facts)
    return Finish(params.normalize, params.dtype, fitted.transform), fitted.facts


def _fit(embedder: Embedder, responses: UsableResponses, trained_on: Iterable[str], params: EmbedParams) -> Fitted:
    raw = Finish(params.normalize, params.dtype)
    before = Anisotropy()

    def blocks() -> Iterator[Any]:
        tables = embedder.tables(among(responses, trained_on), BATCH_ROWS)
        for table in progress(tables, total=None, desc="fit transform", unit="block"):
            vectors = raw.vectors(table)
            before.add(vectors)
            yield vectors

    fitted = fit_transform(params.transform, blocks(), unit_length=params.normalize)
    fitted.facts["anisotropy_before"] = before.value
    return fitted


def _warn(gates: TargetGates, rows: pa.Table) -> None:
    statistics = TargetStatistics()
    deque(statistics.through([rows]), maxlen=0)
    warn_of_gates("embed", gates, statistics.measures(), CAUSES)
