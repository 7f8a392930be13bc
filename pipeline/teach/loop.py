"""The loop of one phase: steps, checkpoints, resume. The objective computes the gradients."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.core.errors import TeacherError
from pipeline.optim.batching import Batches
from pipeline.optim.schedule import rate_factor, take_steps
from pipeline.teach.dropout import SeededDropout
from pipeline.teach.params import PhaseParams, TeachParams

log = logging.getLogger(__name__)


class Objective(Protocol):
    """The loss of a phase, and the dropout it is computed under."""

    dropout: SeededDropout

    def gradients(self, rows: Sequence[int], step: int) -> float:
        """Add the gradients of one batch to the trained parameters, the same for the same step; returns the loss."""
        ...


@dataclass
class Loop:
    """One phase of training.

    Attributes:
        trained: parameters by name.
        params: section `teach`, of which `phase` is a part.
        checkpoint: file of the resumable state; its folder belongs to this phase with these params and texts.
        curve: the loss of each step.
    """

    name: str
    objective: Objective
    trained: Mapping[str, Any]
    batches: Batches
    params: TeachParams
    phase: PhaseParams
    checkpoint: Path
    curve: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        from pipeline.optim.gradients import adamw

        rate, weight_decay = self.phase.learning_rate, self.params.weight_decay
        self._optimizer = adamw(self.trained, rate=rate, weight_decay=weight_decay)

    def run(self) -> None:
        """Take the remaining steps, see `take_steps`; raises TeacherError if a loss or a gradient is not finite."""
        from pipeline.optim.checkpoint import save_checkpoint

        self._resume()
        done, total = len(self.curve), self.phase.steps
        take_steps(
            range(done, total),
            self._step,
            lambda: save_checkpoint(self.checkpoint, self.trained, self._optimizer, {"curve": self.curve}),
            desc=f"teach {self.name}",
            done=done,
            total=total,
            save_every=self.params.checkpoint_every,
        )

    def _resume(self) -> None:
        from pipeline.optim.checkpoint import read_checkpoint

        if found := read_checkpoint(self.checkpoint):
            found.restore(self.trained, self._optimizer)
            self.curve = found.progress["curve"]
            log.info("%s: resuming after step %d of %d", self.name, len(self.curve), self.phase.steps)

    def _step(self, step: int) -> float:
        from torch.nn.utils import clip_grad_norm_

        from pipeline.optim.gradients import set_rate

        params, phase = self.params, self.phase
        set_rate(self._optimizer, rate_factor(step, params.warmup_steps, phase.steps, params.schedule))
        loss = self.objective.gradients(self.batches.at(step), step)
        norm = float(clip_grad_norm_(self.trained.values(), params.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TeacherError(
                f"step {step + 1} is not finite (loss {loss:.4g}, gradient {norm:.4g}): lower "
                f"{phase.learning_rate:g}, or train in float32 (dtype is {params.dtype})",
                argument="learning_rate",
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.curve.append(loss)
        return loss
