"""The loop of one phase: steps, checkpoints, resume. What a step learns is the objective's business."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.core.errors import TeacherError
from pipeline.core.run import progress
from pipeline.optim.batching import Batches
from pipeline.optim.schedule import ScheduleKind, rate_factor, stop_requested

log = logging.getLogger(__name__)


class Objective(Protocol):
    """What a phase trains for."""

    def gradients(self, rows: Sequence[int], step: int) -> float:
        """Add the gradients of one batch to what is trained; the same for the same step. Returns the loss."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How the steps are taken."""

    steps: int
    learning_rate: float
    shape: ScheduleKind
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    checkpoint_every: int


@dataclass
class Loop:
    """One phase of training.

    Attributes:
        name: of the phase, for messages.
        objective: gives gradients.
        trained: parameters by name.
        batches: the rows of each step.
        schedule: how many steps, and how large.
        checkpoint: file of the resumable state, good for this phase with these params and texts alone.
        curve: the loss of each step.
    """

    name: str
    objective: Objective
    trained: Mapping[str, Any]
    batches: Batches
    schedule: Schedule
    checkpoint: Path
    curve: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        from torch.optim import AdamW

        schedule = self.schedule
        self._optimizer = AdamW(
            list(self.trained.values()), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )

    def run(self) -> None:
        """Take the steps that are left; on Ctrl-C or SIGTERM finish the step, save, and raise KeyboardInterrupt.

        Raises:
            TeacherError: a loss or a gradient is not finite.
            WorkError: the disk is full.
        """
        self._resume()
        done, total = len(self.curve), self.schedule.steps
        bar = progress(range(done, total), total=total, desc=f"teach {self.name}", unit="step", initial=done)
        with stop_requested() as stop:
            for step in bar:
                self._step(step)
                bar.set_postfix(loss=f"{self.curve[-1]:.4f}", refresh=False)
                stopping = stop()
                if stopping or step + 1 == total or (step + 1) % self.schedule.checkpoint_every == 0:
                    self._save()
                if stopping:
                    raise KeyboardInterrupt

    def _resume(self) -> None:
        from pipeline.optim.checkpoint import read_checkpoint

        found = read_checkpoint(self.checkpoint)
        if found is None:
            if self.checkpoint.exists():
                log.warning("%s is damaged: the phase starts again", self.checkpoint)
            return
        found.restore(self.trained, self._optimizer)
        self.curve = found.progress["curve"]
        log.info("%s: resuming after step %d of %d", self.name, len(self.curve), self.schedule.steps)

    def _save(self) -> None:
        from pipeline.optim.checkpoint import save_checkpoint

        save_checkpoint(self.checkpoint, self.trained, self._optimizer, {"curve": self.curve})

    def _step(self, step: int) -> None:
        from torch.nn.utils import clip_grad_norm_

        schedule = self.schedule
        factor = rate_factor(step, schedule.warmup_steps, schedule.steps, schedule.shape)
        for group in self._optimizer.param_groups:
            group["lr"] = factor * schedule.learning_rate
        loss = self.objective.gradients(self.batches.at(step), step)
        norm = float(clip_grad_norm_(self.trained.values(), schedule.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TeacherError(
                f"teach.{self.name}: step {step + 1} is not finite (loss {loss:.4g}, gradient {norm:.4g}): lower "
                f"teach.{self.name}.learning_rate ({schedule.learning_rate:g}), or set teach.dtype: float32"
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.curve.append(loss)
