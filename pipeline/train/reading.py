"""The student's own reading of training queries, standardised: what `train.response_share` keeps in the embedding."""

from pipeline.core.errors import TrainingError
from pipeline.core.run import progress
from pipeline.encoder.head import Reading
from pipeline.optim.batching import epoch_order, token_batches, token_budget
from pipeline.train.trainer import Trainer
from pipeline.train.warm_start import QueryReader

ROWS = 2_000
"""Training queries that a reading is fitted on: mean and deviation are then known to some 2 % of a deviation."""


def fit_reading(trainer: Trainer) -> Reading:
    """The reading of a trainer's student as it is, from one query pass over at most `ROWS` rows.

    Every process computes all of them. Raises TrainingError if a hidden state is not finite.
    """
    import torch

    student, rows, query_pass = trainer.student, trainer.rows, trainer.passes.query_pass
    chosen = sorted(int(row) for row in epoch_order(len(rows), 0, trainer.params.seed)[:ROWS])
    lengths = [len(rows.query_ids[row]) + len(student.tokens) for row in chosen]
    batches = token_batches(lengths, token_budget(None, trainer.accelerator.device.type), padded=query_pass.padded)
    read = QueryReader(student, query_pass, may_halve=not trainer.params.shard_backbone)
    features: list[torch.Tensor] = []
    with torch.inference_mode():
        for batch in progress(batches, total=len(batches), desc="reading", unit="batch"):
            hidden = read([rows.query_ids[chosen[number]] for number in batch]).wait()
            features.append(hidden.float().mean(dim=1))
    means = torch.cat(features)
    if not means.isfinite().all():
        raise TrainingError("the hidden states of training queries at the compression tokens are not finite")
    return Reading.fit(student, means)
