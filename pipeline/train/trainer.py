"""The loop: steps, checkpoints, held-out scores. The mathematics is in `pipeline.encoder`.

Every process holds the frozen backbone (or its share of it) and works on its share of each batch; the gradients of the
few trained tensors are summed over processes, so any number of processes takes the same steps.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from pipeline.backbone.sizes import ModelSizes
from pipeline.core.errors import TrainingError
from pipeline.core.run import progress
from pipeline.optim.schedule import any_process, rate_factor, stop_requested
from pipeline.train.params import TrainParams, planned_steps
from pipeline.train.throughput import Throughput
from pipeline.train.validation import Validation

log = logging.getLogger(__name__)

# Batches whose rows are sorted by length together, where padding is paid for.
PADDED_GROUPING = 16


@dataclass
class Trainer:
    """One training run over rows in memory.

    Attributes:
        student: trained in place.
        passes: how batches run through the backbone.
        rows: `TrainingRows`.
        params: section `train`.
        accelerator: device and processes.
        validation: held-out rows; None scores none.
        adapter: trained tensors beside the student's, by name: LoRA.
        checkpoint: file of the resumable state; None keeps none.
        curve: one dict a step: step, loss, align, recon (NaN if its weight is 0), learning_rate.
        shape: sizes of the backbone, to count operations; None counts none.
        facts: about the start, for the record; kept in checkpoints.
    """

    student: Any
    passes: Any
    rows: Any
    params: TrainParams
    accelerator: Any
    validation: Validation | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    shape: ModelSizes | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    _resumed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        from pipeline.optim.gradients import adamw

        self._check()
        params = self.params
        self.trained = {**{f"student.{name}": value for name, value in self.student.named_parameters()}, **self.adapter}
        self.optimizer = adamw(
            self.trained,
            rate=params.learning_rate,
            token_rate=params.token_learning_rate,
            weight_decay=params.weight_decay,
        )
        self.total = planned_steps(len(self.rows), params)
        # Decides the order of rows, so a resumed run keeps it whatever its own passes are.
        self.grouping = params.length_grouping or (PADDED_GROUPING if self.passes.padded else 1)
        self.lengths = self.rows.lengths(params.new_tokens + params.compression_tokens)
        self.throughput = Throughput(
            self.shape,
            self.student.width,
            params.compression_tokens,
            params.thought_tokens,
            sum(value.numel() for value in self.adapter.values()),
        )

    def resume(self) -> bool:
        """Restore the last checkpoint, if there is an intact one.

        Raises:
            TrainingError: it was made with other params, or is further on than these params go.
        """
        from pipeline.optim.checkpoint import read_checkpoint

        found = read_checkpoint(self.checkpoint) if self.checkpoint else None
        if found is None:
            if self.checkpoint and self.checkpoint.exists():
                log.warning("%s is damaged: training starts again", self.checkpoint)
            return False
        self._check_params(found.progress["params"])
        done = len(found.progress["curve"])
        if done > self.total:
            raise TrainingError(
                f"{self.checkpoint} is {done} steps on, the params (train.stop_after_steps, train.epochs) ask for "
                f"{self.total}: set them back, or delete the checkpoint to start again"
            )
        found.restore(self.trained, self.optimizer)
        self.grouping = found.progress["grouping"]
        self.curve, self.facts = found.progress["curve"], found.progress["facts"]
        if self.validation is not None and found.progress["validation"] is not None:
            self.validation.restore(found.progress["validation"], found.kept)
        log.info("resuming after step %d of %d", done, self.total)
        self._resumed = True
        return True

    def run(self) -> None:
        """Take the remaining steps; on Ctrl-C or SIGTERM finish the step, save, and raise KeyboardInterrupt.

        Raises:
            TrainingError: a loss or a gradient is not finite.
        """
        if not self._resumed:
            self._score()
            self.save()  # a closed-form start over many rows takes as long as many steps
        done = len(self.curve)
        steps = islice(enumerate(self._steps()), done, None)
        bar = progress(steps, total=self.total, desc="train", unit="step", initial=done)
        with stop_requested() as stop:
            for step, batch in bar:
                self._step(step, batch)
                bar.set_postfix(loss=f"{self.curve[-1]['loss']:.4f}", refresh=False)
                self._after(step + 1, stopping=any_process(stop(), self.accelerator))
        if self.validation is not None:
            self.validation.restore_best(self.trained)

    def agree(self) -> None:
        """Give every process the trained tensors of the first: GPUs need not round alike."""
        from accelerate.utils import broadcast

        if self.accelerator.num_processes > 1:
            for parameter in self.trained.values():
                parameter.data.copy_(broadcast(parameter.data))

    def save(self) -> None:
        """Write the checkpoint."""
        from pipeline.optim.checkpoint import save_checkpoint

        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        validation = self.validation
        state = {
            "params": self.params.fixed(),
            "facts": self.facts,
            "grouping": self.grouping,
            "curve": self.curve,
            "validation": validation.state() if validation else None,
        }
        best = validation.best.tensors if validation and validation.best else None
        save_checkpoint(self.checkpoint, self.trained, self.optimizer, state, best)

    def _check(self) -> None:
        if self.rows.width != self.student.width:
            raise TrainingError(
                f"targets have {self.rows.width} dimensions, the student embeds in {self.student.width}: "
                "run embed again with the teacher that the student is for"
            )
        if self.params.heldout.select and self.validation is None:
            raise TrainingError("train.heldout.select needs held-out rows: set collect.heldout_fraction above 0")

    def _check_params(self, found: Mapping[str, Any]) -> None:
        wanted = self.params.fixed()
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise TrainingError(
                    f"{self.checkpoint} is a checkpoint of other params: train.{name} is {found.get(name)} there, "
                    f"{wanted.get(name)} here. Set it back, or delete the checkpoint"
                )

    def _steps(self) -> Iterator[list[int]]:
        from pipeline.optim.batching import steps

        params = self.params
        return steps(
            self.lengths, params.batch_size, params.epochs, most=self.total, seed=params.seed, grouping=self.grouping
        )

    def _step(self, step: int, batch: list[int]) -> None:
        from pipeline.optim.gradients import set_rate, sum_and_clip

        started, params = time.monotonic(), self.params
        factor = rate_factor(step, params.warmup_steps, params.schedule_steps or self.total, params.schedule)
        set_rate(self.optimizer, factor)
        align, recon = self._accumulate(batch)
        loss = params.align_weight * align + params.recon_weight * recon
        norm = sum_and_clip(list(self.trained.values()), self.accelerator, params.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._stop_at_bad_rows(
                step, batch, f"alignment {align:.4g}, reconstruction {recon:.4g}, gradient {norm:.4g}"
            )
        if step == 0:
            log.info("first batch: alignment %.4g, reconstruction %.4g (before any update)", align, recon)
        self.optimizer.step()
        self.optimizer.zero_grad()
        recon = recon if params.recon_weight else math.nan
        rate = factor * params.learning_rate
        self.curve.append({"step": step + 1, "loss": loss, "align": align, "recon": recon, "learning_rate": rate})
        self.throughput.count(self.rows.sizes(batch), time.monotonic() - started)

    def _after(self, step: int, *, stopping: bool) -> None:
        every = self.params.heldout.every
        if step == self.total or (every and step % every == 0):
            self._score()
        if stopping or step == self.total or step % self.params.checkpoint_every == 0:
            self.save()
        if stopping:
            raise KeyboardInterrupt

    def _accumulate(self, batch: list[int]) -> tuple[float, float]:
        """Gradients of the whole batch's mean losses; returns those means over all processes."""
        import torch

        from pipeline.optim.gradients import unscale

        params, tokens, scale = self.params, self.rows.batch(batch).response_tokens, _loss_scale(len(batch))
        totals = torch.zeros(2, dtype=torch.float64)
        for rows, weight in self._micro_batches(batch):
            align, recon = self._losses(rows)
            align, recon = weight * align / len(batch), weight * recon / max(1, tokens)
            (scale * (params.align_weight * align + params.recon_weight * recon)).backward()
            totals += torch.tensor([align.item(), recon.item()], dtype=torch.float64)
        unscale(self.trained.values(), scale)
        totals = self.accelerator.reduce(totals.to(self.accelerator.device), "sum")
        return float(totals[0]), float(totals[1])

    def _losses(self, rows: Sequence[int]) -> tuple[Any, Any]:
        """Sums of both losses over these rows."""
        from pipeline.train.losses import loss_sums

        batch, params = self.rows.batch(rows), self.params
        reconstruct = params.recon_weight > 0
        sums = loss_sums(self.student, self.passes, batch, params.align_reduction, reconstruct=reconstruct)
        return sums.align, sums.recon

    def _micro_batches(self, batch: list[int]) -> list[tuple[list[int], float]]:
        """This process's forward passes and their weights.

        With a sharded backbone every process must run as many passes as any other: one whose rows are fewer repeats a
        pass with weight 0.
        """
        from pipeline.optim.batching import deal

        shares = [self._cut(rows) for rows in deal(batch, self.lengths, self.accelerator.num_processes)]
        mine = [(rows, 1.0) for rows in shares[self.accelerator.process_index]]
        if self.params.shard_backbone:
            missing = max(map(len, shares)) - len(mine)
            mine += [(mine[0][0] if mine else batch[:1], 0.0)] * missing
        return mine

    def _cut(self, rows: Sequence[int]) -> list[list[int]]:
        from pipeline.optim.batching import micro_batches

        most_rows, most_tokens = self.params.micro_batch_size, self.params.max_tokens_per_batch
        padded = self.passes.padded
        return micro_batches(rows, self.lengths, most_rows=most_rows, most_tokens=most_tokens, padded=padded)

    def _stop_at_bad_rows(self, step: int, batch: Sequence[int], losses: str) -> NoReturn:
        """Raise, naming the rows of the step whose own losses are not finite. The last checkpoint stays as it is."""
        import torch

        with torch.no_grad():
            alone = {self.rows.ids[row]: [float(loss) for loss in self._losses([row])] for row in batch}
        bad = [name for name, found in alone.items() if not all(map(math.isfinite, found))]
        rows = f"rows whose own loss is not: {', '.join(bad[:8])}" if bad else f"each row alone is: {', '.join(alone)}"
        kept = (
            f"; the last good checkpoint is {self.checkpoint}" if self.checkpoint and self.checkpoint.exists() else ""
        )
        raise TrainingError(
            f"step {step + 1} is not finite ({losses}); {rows}. Look at them with `python -m pipeline inspect embed "
            f"--id ID`, or lower train.learning_rate ({self.params.learning_rate}){kept}"
        )

    def _score(self) -> None:
        if self.validation is not None:
            self.validation.score(len(self.curve), self.student, self.passes, self.trained)


def _loss_scale(rows: int) -> int:
    """A power of two, which changes no bit but where numbers underflow: in float16 those of a large batch's mean do.

    Scaled by about the number of rows, gradients in the backbone are as large as those of one row alone.
    """
    return 1 << (rows - 1).bit_length()
