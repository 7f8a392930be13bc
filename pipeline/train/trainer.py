"""The training loop: steps, checkpoints, held-out scores. The losses are in `losses`, the passes in `encoder.passes`.

Every process holds the frozen backbone (or its share of it) and works on its share of each batch; the gradients of the
few trained tensors are summed over processes, so the steps do not depend on the number of processes.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import broadcast

from pipeline.backbone.sizes import ModelSizes
from pipeline.core.errors import TrainingError
from pipeline.encoder.passes.plain import Passes
from pipeline.encoder.student import Student
from pipeline.optim.batching import deal, micro_batches, steps
from pipeline.optim.checkpoint import read_checkpoint, save_checkpoint
from pipeline.optim.flops import step_flops
from pipeline.optim.gradients import adamw, set_rate, sum_and_clip, unscale
from pipeline.optim.schedule import rate_factor, take_steps
from pipeline.train.data import TrainingRows
from pipeline.train.losses import LossSums, loss_sums
from pipeline.train.params import TrainParams, planned_steps
from pipeline.train.throughput import Throughput
from pipeline.train.validation import Validation

log = logging.getLogger(__name__)

# Default length_grouping of padded passes: longer groups have less padding and less random batches.
PADDED_GROUPING = 16


@dataclass
class Trainer:
    """One training run over rows in memory.

    Attributes:
        student: trained in place.
        passes: how batches run through the backbone.
        validation: held-out rows; None scores none.
        adapter: LoRA's trained tensors by name.
        checkpoint: file of the resumable state; None keeps none.
        sizes: of the backbone, to count operations; None counts none.
        curve: one dict a step: step, loss, align, recon (NaN if its weight is 0), learning_rate.
        facts: about the start, for the record; saved in checkpoints.
    """

    student: Student
    passes: Passes
    rows: TrainingRows
    params: TrainParams
    accelerator: Any
    validation: Validation | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    sizes: ModelSizes | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    _resumed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._check()
        params = self.params
        self.trained = {**{f"student.{name}": value for name, value in self.student.named_parameters()}, **self.adapter}
        rate, token_rate = params.learning_rate, params.token_learning_rate
        self.optimizer = adamw(self.trained, rate=rate, token_rate=token_rate, weight_decay=params.weight_decay)
        self.total = planned_steps(len(self.rows), params)
        # Decides the order of rows, so a resumed run takes it from the checkpoint, whatever its own passes are.
        self.grouping = params.length_grouping or (PADDED_GROUPING if self.passes.padded else 1)
        self.lengths = self.rows.lengths(params.extra_tokens)
        count = partial(
            step_flops,
            compression_tokens=params.compression_tokens,
            thought_tokens=params.thought_tokens,
            width=self.student.width,
            adapter_parameters=sum(value.numel() for value in self.adapter.values()),
        )
        self.throughput = Throughput(partial(count, self.sizes) if self.sizes else None)

    def resume(self) -> bool:
        """Restore the last checkpoint, if there is an intact one.

        Raises TrainingError if it was made with other params, or has more steps than these params ask for.
        """
        found = read_checkpoint(self.checkpoint) if self.checkpoint else None
        if found is None:
            return False
        self._check_params(found.progress["params"])
        done = len(found.progress["curve"])
        if done > self.total:
            raise TrainingError(
                f"{self.checkpoint} has {done} steps, stop_after_steps and epochs ask for {self.total}: set them back, "
                "or delete the checkpoint to start again",
                argument="stop_after_steps",
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
        """Take the remaining steps, see `take_steps`; raises TrainingError if a loss or a gradient is not finite."""
        if not self._resumed:
            self._score()
            self.save()  # a closed-form start over many rows takes as long as many steps
        done = len(self.curve)
        take_steps(
            islice(enumerate(self._steps()), done, None),
            self._take,
            self.save,
            desc="train",
            done=done,
            total=self.total,
            save_every=self.params.checkpoint_every,
            accelerator=self.accelerator,
        )
        if self.validation is not None:
            self.validation.restore_best(self.trained)

    def agree(self) -> None:
        """Give every process the trained tensors of the first: GPUs need not round alike."""
        if self.accelerator.num_processes > 1:
            for parameter in self.trained.values():
                parameter.data.copy_(broadcast(parameter.data))

    def save(self) -> None:
        """Write the checkpoint."""
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        validation = self.validation
        state = {
            "params": self.params.trajectory(),
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
            raise TrainingError(
                f"{self.params.heldout.select} needs held-out rows: set heldout_fraction of the queries above 0",
                argument="heldout.select",
            )

    def _check_params(self, found: Mapping[str, Any]) -> None:
        wanted = self.params.trajectory()
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise TrainingError(
                    f"{wanted.get(name)} here, {found.get(name)} in the checkpoint {self.checkpoint}: set it back, or "
                    "delete the checkpoint",
                    argument=name,
                )

    def _steps(self) -> Iterator[list[int]]:
        params = self.params
        return steps(
            self.lengths, params.batch_size, params.epochs, most=self.total, seed=params.seed, grouping=self.grouping
        )

    def _step(self, step: int, batch: list[int]) -> None:
        started, params = time.monotonic(), self.params
        factor = rate_factor(step, params.warmup_steps, params.schedule_steps or self.total, params.schedule)
        set_rate(self.optimizer, factor)
        align, recon = self._accumulate(batch)
        loss = params.align_weight * align + params.recon_weight * recon
        norm = sum_and_clip(list(self.trained.values()), self.accelerator, params.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._fail(step, batch, f"alignment {align:.4g}, reconstruction {recon:.4g}, gradient {norm:.4g}")
        if step == 0:
            log.info("first batch: alignment %.4g, reconstruction %.4g (before any update)", align, recon)
        self.optimizer.step()
        self.optimizer.zero_grad()
        recon = recon if params.recon_weight else math.nan
        rate = factor * params.learning_rate
        self.curve.append({"step": step + 1, "loss": loss, "align": align, "recon": recon, "learning_rate": rate})
        self.throughput.count(self.rows.sizes(batch), time.monotonic() - started)

    def _take(self, numbered: tuple[int, list[int]]) -> float:
        """Take a step and score after it where that is due; returns its loss."""
        self._step(*numbered)
        step, every = numbered[0] + 1, self.params.heldout.every
        if step == self.total or (every and step % every == 0):
            self._score()
        return self.curve[-1]["loss"]

    def _accumulate(self, batch: list[int]) -> tuple[float, float]:
        """Gradients of the whole batch's mean losses; returns those means over all processes."""
        import torch

        params, tokens = self.params, self.rows.batch(batch).response_tokens
        # A power of two near the number of rows: gradients in the backbone are then as large as those of one row alone.
        # It changes no bit but where numbers underflow: in float16 the gradients of a large batch's mean do.
        scale = 1 << (len(batch) - 1).bit_length()
        totals = torch.zeros(2, dtype=torch.float64)
        for rows, weight in self._micro_batches(batch):
            sums = self._loss_sums(rows)
            align, recon = weight * sums.align / len(batch), weight * sums.recon / max(1, tokens)
            torch.autograd.backward(scale * (params.align_weight * align + params.recon_weight * recon))
            totals += torch.tensor([align.item(), recon.item()], dtype=torch.float64)
        unscale(self.trained.values(), scale)
        totals = self.accelerator.reduce(totals.to(self.accelerator.device), "sum")
        return float(totals[0]), float(totals[1])

    def _loss_sums(self, rows: Sequence[int]) -> LossSums:
        batch, params = self.rows.batch(rows), self.params
        reconstruct = params.recon_weight > 0
        return loss_sums(self.student, self.passes, batch, params.align_reduction, reconstruct=reconstruct)

    def _micro_batches(self, batch: list[int]) -> list[tuple[list[int], float]]:
        """This process's forward passes and their weights.

        With a sharded backbone all processes must run equally many: one with fewer rows repeats a pass with weight 0.
        """
        limits = self.params.pass_limits
        shares = [
            micro_batches(rows, self.lengths, padded=self.passes.padded, **limits)
            for rows in deal(batch, self.lengths, self.accelerator.num_processes)
        ]
        mine = [(rows, 1.0) for rows in shares[self.accelerator.process_index]]
        if self.params.shard_backbone:
            missing = max(map(len, shares)) - len(mine)
            mine += [(mine[0][0] if mine else batch[:1], 0.0)] * missing
        return mine

    def _fail(self, step: int, batch: Sequence[int], losses: str) -> NoReturn:
        """Raise, naming the rows of the step whose own losses are not finite. The last checkpoint stays as it is."""
        import torch

        with torch.no_grad():
            sums = {self.rows.ids[row]: self._loss_sums([row]) for row in batch}
        bad = [name for name, found in sums.items() if not math.isfinite(float(found.align + found.recon))]
        rows = f"rows whose own loss is not: {', '.join(bad[:8])}" if bad else f"each row alone is: {', '.join(sums)}"
        saved = self.checkpoint is not None and self.checkpoint.exists()
        last = f"; the last good checkpoint is {self.checkpoint}" if saved else ""
        raise TrainingError(
            f"step {step + 1} is not finite ({losses}); {rows}. Look at them with `python -m pipeline inspect embed "
            f"--id ID`, or lower learning_rate ({self.params.learning_rate}){last}"
        )

    def _score(self) -> None:
        if self.validation is not None:
            self.validation.score(len(self.curve), self.student, self.passes, self.trained)
