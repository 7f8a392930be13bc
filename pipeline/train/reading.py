"""What a trainer's student reads of training queries, and its standardised reading, which a response share keeps.

Where the teacher embedded the queries too, the reading gets a map to the teacher's space: the ridge regression of these
embeddings on it, by which it can be added to the prediction (`train.response_form`).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipeline.core.errors import TrainingError
from pipeline.encoder.head import Reading
from pipeline.encoder.student import Student
from pipeline.optim.batching import epoch_order
from pipeline.train.ridge import LinearMap
from pipeline.train.states import READ_TOKENS, RowPasses, kept_states
from pipeline.train.trainer import Trainer
from pipeline.train.warm_start import Statistics, accumulate, closed_form

log = logging.getLogger(__name__)

ROWS = 2_000
"""Training queries that a reading is fitted on: mean and deviation are then known to some 2 % of a deviation."""
MAPPED_ROWS = 20_000
"""Training queries that a map to the teacher's space is fitted on; the deviation on those that are kept whole."""


def sample(trainer: Trainer, most: int | None) -> np.ndarray:
    """At most `most` training rows by the seed, in their order; None: all."""
    return np.sort(epoch_order(len(trainer.rows), 0, trainer.params.seed)[:most])


@contextmanager
def row_passes(trainer: Trainer) -> Iterator[RowPasses]:
    """Query passes with a trainer's student as it is, whose states are kept."""
    accelerator = trainer.accelerator
    with kept_states(trainer.origin, trainer.student, trainer.adapter, accelerator) as kept:
        yield RowPasses(
            trainer.student,
            trainer.passes.query_pass,
            accelerator,
            most_rows=trainer.limits.most_rows,
            most_tokens=None if accelerator.device.type == "cpu" else READ_TOKENS,
            even=trainer.params.shard_backbone,
            kept=kept,
        )


def row_statistics(trainer: Trainer, most: int | None, targets: Any = None) -> Statistics:
    """Statistics of at most `most` training rows, read by a trainer's student as it is; all processes share the pass.

    `targets` `[N, e]` of all rows, in place of those of the responses. Raises TrainingError if a value is not finite.
    """
    statistics = Statistics(trainer.student.compression_tokens, trainer.student.hidden)
    with row_passes(trainer) as passes:
        return accumulate(statistics, trainer.rows, sample(trainer, most), passes, targets)


def fit_reading(trainer: Trainer) -> Reading:
    """The reading of a trainer's student as it is, over at most `ROWS` rows, which all processes share.

    With a map to the teacher's space, over at most `MAPPED_ROWS`, if the rows have the teacher's embeddings of queries.

    Raises TrainingError if a hidden state is not finite.
    """
    import torch
    from accelerate.utils import gather_object

    if trainer.rows.query_targets is not None:
        return mapped_reading(trainer.student, row_statistics(trainer, MAPPED_ROWS, trainer.rows.query_targets))
    with row_passes(trainer) as passes:
        own = [(numbers, states.features) for numbers, states in passes.read(trainer.rows, sample(trainer, ROWS))]
    if trainer.accelerator.num_processes > 1:
        own = gather_object(own)
    features = np.concatenate([found for _, found in own])[np.argsort(np.concatenate([at for at, _ in own]))]
    if not np.isfinite(features).all():
        raise TrainingError("the hidden states of training queries at the compression tokens are not finite")
    return Reading.fit(trainer.student, torch.from_numpy(features))


def mapped_reading(student: Student, statistics: Statistics) -> Reading:
    """The reading with its map, of statistics of queries whose targets are the teacher's embeddings of them."""
    import torch

    features = torch.from_numpy(statistics.scored_rows()[0])
    reading = Reading.fit(student, features)
    mean, scale = reading.mean.double().numpy(), reading.scale.double().numpy()
    found, ridge = closed_form(statistics.folds(), LinearMap(np.diag(scale), -scale * mean))
    log.info("map of the reading to the teacher's space: ridge %g over %d rows", ridge, len(statistics))
    return reading.with_map(torch.from_numpy(found.weight), torch.from_numpy(found.bias), features)
