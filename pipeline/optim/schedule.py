"""The learning rate of each step, and the loop over steps, which stops between two of them on a signal."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

from pipeline.core.run import progress

T = TypeVar("T")

ScheduleKind = Literal["constant", "linear", "cosine"]


def rate_factor(step: int, warmup: int, total: int, kind: ScheduleKind = "linear") -> float:
    """Linear warm-up to 1 over `warmup` steps, then constant, or down to 0 at `total`, straight or as half a cosine.

    Args:
        step: counts from 0.
        warmup: steps.
        total: steps.
        kind: of the way after the warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    left = min(1.0, max(0.0, (total - step) / max(1, total - warmup)))
    return left if kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def take_steps(
    steps: Iterable[T],
    take: Callable[[T], float],
    save: Callable[[], None],
    *,
    desc: str,
    done: int,
    total: int,
    save_every: int,
    accelerator: Any = None,
) -> None:
    """Take the steps after the first `done` of `total`; save after every `save_every` and after the last.

    On Ctrl-C or SIGTERM (of a spot instance) in any process it finishes the step, saves, and raises KeyboardInterrupt.
    `take` returns the loss of a step, for the progress bar.
    """
    bar = progress(steps, total=total, desc=desc, unit="step", initial=done)
    with _stop_requested() as stop:
        for count, step in enumerate(bar, done + 1):
            bar.set_postfix(loss=f"{take(step):.4f}", refresh=False)
            stopping = _any_process(stop(), accelerator)
            if stopping or count == total or count % save_every == 0:
                save()
            if stopping:
                raise KeyboardInterrupt


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


def _any_process(flag: bool, accelerator: Any) -> bool:
    """Whether the flag is set in any process, so that all of them do the same."""
    import torch

    if accelerator is None or accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)
