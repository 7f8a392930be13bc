"""What a trainer's student reads of training queries, and its standardised reading, which a response share keeps.

Its map may decorrelate it (`train.decorrelate_reading`). To be added to the prediction (`train.response_form`) the
reading must lie in the targets' space. Where the teacher embedded the queries too, it gets a map: the ridge regression
of these embeddings on it. Where the targets are a decorrelated reading of the backbone, it is decorrelated likewise.
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
from pipeline.train.reading_map import decorrelation
from pipeline.train.ridge import LinearMap
from pipeline.train.states import READ_TOKENS, RowPasses, kept_states
from pipeline.train.trainer import Trainer
from pipeline.train.warm_start import Statistics, accumulate, closed_form

log = logging.getLogger(__name__)

ROWS = 2_000
"""Training queries that a reading is fitted on: mean and deviation are then known to some 2 % of a deviation."""
DECORRELATED_ROWS = 5_000
"""The same where correlations are fitted too: what the closed form keeps whole of its rows."""
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
    """The reading of a trainer's student as it is, over a sample of its rows, which all processes share.

    Raises TrainingError if a hidden state is not finite.
    """
    from accelerate.utils import gather_object

    if trainer.rows.query_targets is not None:
        return mapped_reading(trainer.student, row_statistics(trainer, MAPPED_ROWS, trainer.rows.query_targets))
    most = DECORRELATED_ROWS if trainer.reading_transform else ROWS
    with row_passes(trainer) as passes:
        own = [(numbers, states.features) for numbers, states in passes.read(trainer.rows, sample(trainer, most))]
    if trainer.accelerator.num_processes > 1:
        own = gather_object(own)
    features = np.concatenate([found for _, found in own])[np.argsort(np.concatenate([at for at, _ in own]))]
    if not np.isfinite(features).all():
        raise TrainingError("the hidden states of training queries at the compression tokens are not finite")
    return reading_of(trainer, features)


def reading_of(trainer: Trainer, features: np.ndarray) -> Reading:
    """The reading of mean hidden states `[N, d]`, decorrelated if the trainer says so."""
    import torch

    read = torch.from_numpy(features)
    reading = Reading.fit(trainer.student, read)
    # Readings of one row, or of equal ones, have no correlation.
    if trainer.reading_transform is None or not reading.scale.any():
        return reading
    found = decorrelation(reading.standardized(read).numpy(), trainer.reading_transform)
    return reading.with_map(torch.from_numpy(found.weight), torch.from_numpy(found.bias), read)


def mapped_reading(student: Student, statistics: Statistics) -> Reading:
    """The reading with its map, of statistics of queries whose targets are the teacher's embeddings of them."""
    import torch

    features = torch.from_numpy(statistics.scored_rows()[0])
    reading = Reading.fit(student, features)
    mean, scale = reading.mean.double().numpy(), reading.scale.double().numpy()
    found, ridge = closed_form(statistics.folds(), LinearMap(np.diag(scale), -scale * mean))
    log.info("map of the reading to the teacher's space: ridge %g over %d rows", ridge, len(statistics))
    return reading.with_map(torch.from_numpy(found.weight), torch.from_numpy(found.bias), features)
