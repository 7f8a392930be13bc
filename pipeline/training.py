"""Train the student: the loop, its schedule, its checkpoints. The mathematics is in `pipeline.encoder`.

    python -m pipeline.stages.train                        one process
    accelerate launch -m pipeline.stages.train             one process a GPU

Every process holds one frozen backbone and works on its share of each batch; the gradients of the few trained tensors
are summed over processes, so any number of processes takes the same steps.
"""

import contextlib
import logging
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from pipeline.backbone import Template
from pipeline.errors import TrainingError
from pipeline.params import Params
from pipeline.runtime import progress

log = logging.getLogger(__name__)


class WarmStartParams(Params):
    """The closed-form start of the projections (off: the paper's random start)."""

    enabled: bool = False
    ridge: float | Literal["auto"] = "auto"
    rows: int = Field(default=20_000, ge=2, description="at most this many training rows")


class TrainParams(Params):
    """Section `train`."""

    compression_tokens: int = Field(ge=1)
    thought_tokens: int = Field(ge=0)
    template: Template
    max_query_tokens: int = Field(ge=1)
    max_response_tokens: int = Field(ge=1)
    drop_loops: bool = Field(default=False, description="leave out answers that end in a repetition loop")
    passes: Literal["packed", "plain"] = "packed"
    align_weight: float = Field(ge=0)
    recon_weight: float = Field(ge=0)
    align_reduction: Literal["mean", "sum"]
    warm_start: WarmStartParams
    learning_rate: float = Field(gt=0)
    token_learning_rate: float | None = Field(default=None, gt=0, description="of the token rows; null = learning_rate")
    weight_decay: float = Field(ge=0)
    warmup_steps: int = Field(ge=0)
    schedule_steps: int | None = Field(default=None, ge=1, description="where the rate reaches 0; null = last step")
    epochs: int = Field(ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(ge=1, description="rows of one optimiser step, over all processes")
    micro_batch_size: int = Field(ge=1, description="rows of one forward pass")
    max_grad_norm: float = Field(gt=0)
    checkpoint_every: int = Field(ge=1, description="optimiser steps")
    seed: int


def rate_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up to 1 over `warmup` steps, then linear to 0 at `total`; `step` counts from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def planned_steps(rows: int, params: TrainParams) -> int:
    """Optimiser steps that the params ask for."""
    steps = math.ceil(rows / params.batch_size) * params.epochs
    return min(steps, params.max_steps) if params.max_steps else steps


@dataclass
class Trainer:
    """One training run over rows in memory.

    Attributes:
        student: trained in place.
        passes: how batches run through the frozen backbone.
        rows: `TrainingRows`.
        params: section `train`.
        checkpoint: file of the resumable state; None keeps none.
        accelerator: device and processes.
        curve: one dict a step: step, loss, align, recon, learning_rate.
    """

    student: Any
    passes: Any
    rows: Any
    params: TrainParams
    accelerator: Any
    checkpoint: Path | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch

        tokens, projections = [self.student.tokens], []
        for module in (self.student.reconstruction, self.student.alignment):
            projections += list(module.parameters())
        rate = self.params.learning_rate
        groups = [
            {"params": projections, "peak": rate, "weight_decay": self.params.weight_decay},
            {"params": tokens, "peak": self.params.token_learning_rate or rate, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=rate)
        self.total = planned_steps(len(self.rows), self.params)

    def resume(self) -> bool:
        """Restore the last checkpoint, if there is an intact one."""
        from pipeline.encoder.checkpoint import load_checkpoint

        if self.checkpoint is None:
            return False
        state = load_checkpoint(self.checkpoint, self.student, self.optimizer)
        if state is None:
            if self.checkpoint.exists():
                log.warning("%s is damaged: training starts again", self.checkpoint)
            return False
        self.curve = state["curve"]
        log.info("resuming after step %d of %d", len(self.curve), self.total)
        return True

    def run(self) -> None:
        """Take the remaining steps; on Ctrl-C or SIGTERM finish the step, save, and raise KeyboardInterrupt.

        Raises:
            TrainingError: a loss is not finite.
        """
        from pipeline.encoder.data import steps

        done = len(self.curve)
        batches = steps(len(self.rows), self.params.batch_size, self.params.epochs, self.total, self.params.seed)
        remaining = islice(enumerate(batches), done, None)
        bar = progress(remaining, total=self.total, desc="train", unit="step", initial=done)
        with _stop_requested() as stop:
            for step, batch in bar:
                self._step(step, batch)
                bar.set_postfix(loss=f"{self.curve[-1]['loss']:.4f}", refresh=False)
                if stop() or (step + 1) % self.params.checkpoint_every == 0:
                    self.save()
                if stop():
                    raise KeyboardInterrupt

    def save(self) -> None:
        """Write the checkpoint."""
        from pipeline.encoder.checkpoint import save_checkpoint

        if self.checkpoint is not None and self.accelerator.is_main_process:
            save_checkpoint(self.checkpoint, self.student, self.optimizer, {"curve": self.curve})

    def _step(self, step: int, batch: list[int]) -> None:
        rate = self._set_rate(step)
        align, recon = self._accumulate(batch)
        loss = self.params.align_weight * align + self.params.recon_weight * recon
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss is {loss} at step {step + 1} (alignment {align:.4g}, reconstruction {recon:.4g}): "
                f"lower train.learning_rate ({self.params.learning_rate}) or check the targets"
            )
        if step == 0:
            log.info("first batch: alignment %.4g, reconstruction %.4g (before any update)", align, recon)
        self._update()
        self.curve.append({"step": step + 1, "loss": loss, "align": align, "recon": recon, "learning_rate": rate})

    def _set_rate(self, step: int) -> float:
        factor = rate_factor(step, self.params.warmup_steps, self.params.schedule_steps or self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        return factor * self.params.learning_rate

    def _accumulate(self, batch: list[int]) -> tuple[float, float]:
        """Gradients of the whole batch's mean losses; returns those means over all processes."""
        import torch

        from pipeline.encoder.losses import loss_sums

        tokens = self.rows.batch(batch).response_tokens
        mine = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        totals = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(mine), self.params.micro_batch_size):
            micro = self.rows.batch(mine[start : start + self.params.micro_batch_size])
            sums = loss_sums(self.student, self.passes, micro, self.params.align_reduction)
            align, recon = sums.align / len(batch), sums.recon / max(1, tokens)
            (self.params.align_weight * align + self.params.recon_weight * recon).backward()
            totals += torch.tensor([align.item(), recon.item()], dtype=torch.float64)
        totals = self.accelerator.reduce(totals.to(self.accelerator.device), "sum")
        return float(totals[0]), float(totals[1])

    def _update(self) -> None:
        import torch

        parameters = list(self.student.parameters())
        for parameter in parameters:
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(gradient, "sum")
        torch.nn.utils.clip_grad_norm_(parameters, self.params.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGINT and SIGTERM only set a flag, so that no update is cut in half."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda got, _frame: received.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def warm_start_student(
    student: Any, passes: Any, rows: Any, params: TrainParams, words: np.ndarray, frame_ids: list[int]
) -> float:
    """Give `student` its closed-form start from (at most `params.warm_start.rows`) training rows.

    Args:
        student: changed in place.
        passes: how batches run through the frozen backbone.
        rows: `TrainingRows`.
        params: section `train`.
        words: the backbone's input embeddings `[V, d]`.
        frame_ids: the prompt of an empty query; its end is what the soft prompts start from.

    Returns:
        The ridge strength used.
    """
    from pipeline.encoder.data import epoch_order
    from pipeline.encoder.warm_start import frame_rows, warm_start

    chosen = np.sort(epoch_order(len(rows), 0, params.seed)[: params.warm_start.rows])
    hidden = hidden_states(student, passes, [rows.query_ids[row] for row in chosen], params.micro_batch_size)
    frame = frame_rows(words, frame_ids, student.compression_tokens)
    norm = float(np.linalg.norm(words, axis=-1).mean())
    return warm_start(student, hidden, rows.targets[chosen], frame, norm, params.warm_start.ridge)


def hidden_states(student: Any, passes: Any, query_ids: list[Any], batch_size: int) -> np.ndarray:
    """Hidden states float32 `[N, n, d]` at the compression tokens, without gradients, shortest queries first."""
    import torch

    order = sorted(range(len(query_ids)), key=lambda row: len(query_ids[row]))
    result = np.empty((len(order), student.compression_tokens, student.hidden), dtype=np.float32)
    with torch.inference_mode():
        for start in progress(range(0, len(order), batch_size), total=None, desc="warm start", unit="batch"):
            at = order[start : start + batch_size]
            found = passes.query_pass([query_ids[row] for row in at], student.tokens, student.compression_tokens)
            result[at] = found.cpu().numpy()
    return result
