"""Stopping between two steps when a signal asks for it: Ctrl-C, or SIGTERM from a spot instance's end."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


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
