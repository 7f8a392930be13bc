"""The learning rate of each step, and stopping between two steps on a signal (Ctrl-C, SIGTERM of a spot instance)."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any, Literal

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


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
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


def any_process(flag: bool, accelerator: Any) -> bool:
    """Whether the flag is set in any process, so that all of them do the same."""
    import torch

    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)
