"""What a trainer's student reads of training queries, and its standardised reading, which a response share keeps."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from pipeline.core.errors import TrainingError
from pipeline.encoder.head import Reading
from pipeline.optim.batching import epoch_order
from pipeline.train.states import READ_TOKENS, RowPasses, kept_states
from pipeline.train.trainer import Trainer

ROWS = 2_000
"""Training queries that a reading is fitted on: mean and deviation are then known to some 2 % of a deviation."""


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


def fit_reading(trainer: Trainer) -> Reading:
    """The reading of a trainer's student as it is, over at most `ROWS` rows, which all processes share.

    Raises TrainingError if a hidden state is not finite.
    """
    import torch
    from accelerate.utils import gather_object

    with row_passes(trainer) as passes:
        own = [(numbers, states.features) for numbers, states in passes.read(trainer.rows, sample(trainer, ROWS))]
    if trainer.accelerator.num_processes > 1:
        own = gather_object(own)
    features = np.concatenate([found for _, found in own])[np.argsort(np.concatenate([at for at, _ in own]))]
    if not np.isfinite(features).all():
        raise TrainingError("the hidden states of training queries at the compression tokens are not finite")
    return Reading.fit(trainer.student, torch.from_numpy(features))
