"""The learning rate of each step, and the loop over steps, which stops between two of them on a signal."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

from pipeline.core.run import let_next_interrupt_kill, progress

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
    take: Callable[[T], float | None],
    save: Callable[[], None],
    *,
    desc: str,
    done: int,
    total: int,
    save_every: int,
    accelerator: Any = None,
) -> None:
    """Take the steps after the first `done` of `total`; save after every `save_every` and after the last.

    On Ctrl-C or SIGTERM (of a spot instance) in any process it finishes the step (several processes: and the next),
    saves, and raises KeyboardInterrupt.
    `take` returns the last loss that is known, for the progress bar; None: none yet.
    """
    bar = progress(steps, total=total, desc=desc, unit="step", initial=done)
    agreed = _Agreement(accelerator)
    with _stop_requested() as stop:
        for count, step in enumerate(bar, done + 1):
            if (loss := take(step)) is not None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            stopping = agreed(stop())
            if stopping or count == total or count % save_every == 0:
                save()
            if stopping:
                raise KeyboardInterrupt


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGINT and SIGTERM only set a flag, so that no update is cut in half.

    A second Ctrl-C ends the process at once; the last checkpoint stays.
    """
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        let_next_interrupt_kill()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Agreement:
    """Whether to stop, the same in all processes; of several, what one wants is known to all a step later."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._before: Any = None

    def __call__(self, wanted: bool) -> bool:
        from pipeline.optim.late import HostCopy

        if self._accelerator is None or self._accelerator.num_processes == 1:
            return wanted
        before, self._before = self._before, HostCopy(_votes(wanted, self._accelerator))
        return before is not None and bool(before.wait() > 0)


def any_process(flag: bool, accelerator: Any) -> bool:
    """Whether the flag is set in any process, so that all of them do the same."""
    return flag if accelerator.num_processes == 1 else bool(_votes(flag, accelerator) > 0)


def _votes(flag: bool, accelerator: Any) -> Any:
    """How many processes have the flag set, a scalar on the device."""
    import torch

    return accelerator.reduce(torch.full((), float(flag), device=accelerator.device), "sum")
