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
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor

from pipeline.backbone.device import exact_dtype
from pipeline.backbone.sizes import ModelSizes
from pipeline.core.errors import TrainingError
from pipeline.core.target_transform import TransformParams
from pipeline.core.tracking import Log
from pipeline.encoder.passes.plain import Passes
from pipeline.encoder.student import Student
from pipeline.optim.batching import dealt_passes, grouped, own_passes, steps
from pipeline.optim.checkpoint import read_checkpoint, save_checkpoint
from pipeline.optim.flops import step_flops
from pipeline.optim.gradients import adamw, set_rate, sum_and_clip, unscale, update
from pipeline.optim.late import HostCopy
from pipeline.optim.schedule import rate_factor, take_steps
from pipeline.train.data import TrainingRows
from pipeline.train.fit import CPU_ROWS, PassLimits, Trial, halve_until_fit
from pipeline.train.losses import add_gradients, loss_sums
from pipeline.train.params import TrainParams, planned_steps
from pipeline.train.throughput import Throughput
from pipeline.train.validation import HeldoutScores, Validation, heldout_scores

log = logging.getLogger(__name__)

# Default length_grouping of padded passes: longer groups have less padding and less random batches.
PADDED_GROUPING = 16
_START = "start."  # of the names in a checkpoint
# Memory of a query token whose prefix is frozen, in that of a response token: keys and values (docs/training.md).
_FROZEN = 1 / 16
# What a query pass for several response passes may keep, as a share of what the largest of these keeps.
_QUERY_SHARE = 1 / 8


@dataclass(frozen=True)
class _Unread:
    """A step that was launched: its number from 0, its rows, its rate, and the losses and norm that it will have."""

    step: int
    batch: list[int]
    rate: float
    values: HostCopy


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
        origin: what pins the backbone and its precision, by which hidden states are kept; None keeps none.
        curve: one dict a step: step, loss, align, recon (NaN if its weight is 0), learning_rate.
        facts: about the start, for the record, saved in checkpoints; and about the alignment, where it is fitted again.
        start: the student before its first step, of `start_tensors`; saved in checkpoints.
        reading_transform: by which the standardised reading is decorrelated; None if it is not.
        track: gets the losses of each step, and held-out scores; of the first process alone.
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
    origin: Mapping[str, Any] | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    start: Mapping[str, Any] = field(default_factory=dict)
    reading_transform: TransformParams | None = None
    track: Log | None = None
    _resumed: bool = field(default=False, init=False)
    _unread: "_Unread | None" = field(default=None, init=False)

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
        rows = params.pass_rows(self.accelerator.num_processes)
        if params.micro_batch_size == "auto" and self.accelerator.device.type == "cpu":
            rows = min(rows, CPU_ROWS)
        self.limits = PassLimits(rows, params.max_tokens_per_batch)
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
        kept = found.kept
        self.start = {name.removeprefix(_START): value for name, value in kept.items() if name.startswith(_START)}
        if self.validation is not None and found.progress["validation"] is not None:
            best = {name: value for name, value in kept.items() if not name.startswith(_START)}
            self.validation.restore(found.progress["validation"], best)
        log.info("resuming after step %d of %d", done, self.total)
        self._resumed = True
        return True

    def run(self) -> None:
        """Take the remaining steps, see `take_steps`; raises TrainingError if a loss or a gradient is not finite."""
        if self.accelerator.device.type != "cpu" and not self.params.shard_backbone:
            self.fit()
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
        self._finish_steps()
        if self.validation is not None:
            self.validation.restore_best(self.trained)

    def fit(self) -> None:
        """Halve the forward passes until the costliest step that is left fits into the memory of every process.

        Raises TrainingError if one row does not fit.
        """
        self.limits = halve_until_fit(self.limits, self._trial, self.accelerator)

    def agree(self) -> None:
        """Give every process the trained tensors of the first: GPUs need not round alike."""
        if self.accelerator.num_processes > 1:
            for parameter in self.trained.values():
                parameter.data.copy_(broadcast(parameter.data))

    def heldout_scores(self, validation: Validation) -> HeldoutScores:
        """Scores of held-out rows with the student as it is; all processes share the passes."""
        rows = validation.rows
        shares = self._dealt(range(len(rows)), rows.lengths(self.params.extra_tokens))
        own = own_passes(shares, self.accelerator.process_index, even=self.params.shard_backbone)
        return heldout_scores(rows, own, self.student, self.passes, self.accelerator)

    def save(self) -> None:
        """Write the checkpoint; raises TrainingError instead if the last step is not finite."""
        self._finish_steps()
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
        best = validation.best.tensors if validation and validation.best else {}
        kept = {**best, **{f"{_START}{name}": value for name, value in self.start.items()}}
        save_checkpoint(self.checkpoint, self.trained, self.optimizer, state, kept)

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
        """Launch a step; the one before it is read while the device computes this one."""
        params = self.params
        factor = rate_factor(step, params.warmup_steps, params.schedule_steps or self.total, params.schedule)
        set_rate(self.optimizer, factor)
        losses = self._accumulate(batch)
        norm = sum_and_clip(list(self.trained.values()), self.accelerator, params.max_grad_norm)
        self._read()
        values = torch.cat([losses, norm[None].to(losses)])
        update(self.optimizer, values)
        self._unread = _Unread(step, batch, factor * params.learning_rate, HostCopy(values))

    def _read(self) -> None:
        """Add the step that was launched last to the curve; raises TrainingError if it is not finite."""
        if self._unread is None:
            return
        found, self._unread = self._unread, None
        align, recon, norm = found.values.wait().tolist()
        loss = self.params.align_weight * align + self.params.recon_weight * recon
        if not (math.isfinite(loss) and math.isfinite(norm)):
            losses = f"alignment {align:.4g}, reconstruction {recon:.4g}, gradient {norm:.4g}"
            self._fail(found.step, found.batch, losses)
        if found.step == 0:
            log.info("first batch: alignment %.4g, reconstruction %.4g (before any update)", align, recon)
        recon = recon if self.params.recon_weight else math.nan
        figures = {"loss": loss, "align": align, "recon": recon, "learning_rate": found.rate}
        self.curve.append({"step": found.step + 1, **figures})
        if self.track is not None:
            self.track({**figures, "tokens_per_second": self.throughput.tokens_per_second}, found.step + 1)

    def _finish_steps(self) -> None:
        """Wait for what was launched and read it."""
        started = time.monotonic()
        self._read()
        self.throughput.seconds += time.monotonic() - started

    def _take(self, numbered: tuple[int, list[int]]) -> float | None:
        """Take a step and score after it where that is due; returns the last loss that is known."""
        started = time.monotonic()
        self._step(*numbered)
        self.throughput.count(self.rows.sizes(numbered[1]), time.monotonic() - started)
        step, every = numbered[0] + 1, self.params.heldout.every
        if step == self.total or (every and step % every == 0):
            self._score()
        return self.curve[-1]["loss"] if self.curve else None

    def _accumulate(self, batch: list[int]) -> Tensor:
        """Gradients of the whole batch's mean losses; returns those means over all processes, `[2]` float64."""
        # A power of two near the number of rows: gradients in the backbone are then as large as those of one row alone.
        # It changes no bit but where numbers underflow: in float16 the gradients of a large batch's mean do.
        scale = 1 << (len(batch) - 1).bit_length()
        totals = self._add_gradients(batch, scale)
        unscale(self.trained.values(), scale)
        return self.accelerator.reduce(totals, "sum")

    def _add_gradients(self, batch: list[int], scale: int = 1) -> Tensor:
        """Gradients of this process's share, times `scale`; its share of both means, `[2]` in `exact_dtype`."""
        params, tokens = self.params, sum(response for _, response in self.rows.sizes(batch))
        device = self.student.tokens.device
        totals = torch.zeros(2, dtype=exact_dtype(device), device=device)
        for passes, weight in self._groups(batch):
            align, recon = weight / len(batch), weight / max(1, tokens)
            sums = add_gradients(
                self.student,
                self.passes,
                self.rows.batch(list(chain(*passes))),
                list(map(len, passes)),
                params.align_reduction,
                align=scale * params.align_weight * align,
                recon=scale * params.recon_weight * recon,
                reconstruct=params.recon_weight > 0,
            )
            totals[0] += align * sums[0]
            totals[1] += recon * sums[1]
        return totals

    def _shares(self, batch: Sequence[int]) -> list[list[list[int]]]:
        """The forward passes of each process."""
        return self._dealt(batch, self.lengths)

    def _dealt(self, rows: Sequence[int], lengths: np.ndarray) -> list[list[list[int]]]:
        processes = self.accelerator.num_processes
        return dealt_passes(rows, lengths, processes, padded=self.passes.padded, **vars(self.limits))

    def _groups(self, batch: list[int]) -> list[tuple[list[list[int]], float]]:
        """This process's forward passes by the query pass that they share, each group with its weight.

        Rows of several response passes share a query pass as long as it keeps little beside the largest of them.
        """
        own = own_passes(self._shares(batch), self.accelerator.process_index, even=self.params.shard_backbone)
        if not self.passes.queries_together or self.params.shard_backbone:
            return [([rows], weight) for rows, weight in own]
        mine = [rows for rows, _ in own]
        most = _QUERY_SHARE * max(map(self._cost, mine), default=0.0)
        return [(passes, 1.0) for passes in grouped(mine, self._query_cost, most)]

    def _trial(self, limits: PassLimits) -> Trial:
        """The step that takes most with these limits, of those that are left, beside what the optimiser will take."""
        self.limits = limits
        left = islice(self._steps(), len(self.curve), None)
        batch = max(left, key=self._step_cost, default=[])
        largest = max(chain(*self._shares(batch)), key=self._pass_cost, default=[])
        return Trial(len(largest), int(self.lengths[largest].sum()), partial(self._try, batch))

    def _cost(self, rows: Sequence[int]) -> float:
        """What a response pass of these rows keeps, in response tokens."""
        sizes = [response for _, response in self.rows.sizes(rows)]
        tokens = len(rows) * max(sizes) if self.passes.padded else sum(sizes)
        return tokens + len(rows) * self.params.compression_tokens

    def _query_cost(self, rows: Sequence[int]) -> float:
        """What a query pass of these rows keeps, in response tokens."""
        sizes = [query for query, _ in self.rows.sizes(rows)]
        tokens = len(rows) * max(sizes) if self.passes.padded else sum(sizes)
        return len(rows) * len(self.student.tokens) + tokens * (_FROZEN if self.passes.queries_together else 1.0)

    def _step_cost(self, batch: Sequence[int]) -> float:
        """What the largest pass of a step keeps, in whatever process."""
        return max(map(self._pass_cost, chain(*self._shares(batch))), default=0.0)

    def _pass_cost(self, rows: Sequence[int]) -> float:
        return self._cost(rows) + self._query_cost(rows)

    def _try(self, batch: list[int]) -> None:
        taken = [] if self.optimizer.state else [torch.empty_like(v) for v in self.trained.values() for _ in range(2)]
        try:
            for parameter in self.trained.values():
                parameter.grad = torch.zeros_like(parameter)
            self._add_gradients(batch)
        finally:
            del taken
            self.optimizer.zero_grad()

    def _fail(self, step: int, batch: Sequence[int], losses: str) -> NoReturn:
        """Raise, naming the rows of the step whose own losses are not finite. The last checkpoint stays as it is."""
        reduction, reconstruct = self.params.align_reduction, self.params.recon_weight > 0
        with torch.no_grad():
            sums = {
                self.rows.ids[row]: loss_sums(
                    self.student, self.passes, self.rows.batch([row]), reduction, reconstruct=reconstruct
                )
                for row in batch
            }
        bad = [name for name, found in sums.items() if not math.isfinite(float(found.align + found.recon))]
        rows = f"rows whose own loss is not: {', '.join(bad[:8])}" if bad else f"each row alone is: {', '.join(sums)}"
        saved = self.checkpoint is not None and self.checkpoint.exists()
        last = f"; the last good checkpoint is {self.checkpoint}" if saved else ""
        raise TrainingError(
            f"step {step + 1} is not finite ({losses}); {rows}. Look at them with `python -m pipeline inspect embed "
            f"--id ID`, or lower learning_rate ({self.params.learning_rate}){last}"
        )

    def _score(self) -> None:
        self._finish_steps()
        if self.validation is not None:
            self.validation.add(len(self.curve), self.heldout_scores(self.validation), self.trained)
            if self.track is not None:
                scores = {
                    f"heldout/{name}": value for name, value in self.validation.curve[-1].items() if name != "step"
                }
                self.track(scores, len(self.curve))
