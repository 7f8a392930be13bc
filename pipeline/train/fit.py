"""How many rows run at a time: the costliest step of a run is tried before its first one, and halved until it fits."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.backbone.device import release_memory
from pipeline.core.errors import TrainingError
from pipeline.core.run import device_memory_error, is_out_of_memory
from pipeline.optim.schedule import any_process

log = logging.getLogger(__name__)

# Rows of a forward pass on a CPU where none are set: nothing says in time that main memory is short.
CPU_ROWS = 16


@dataclass(frozen=True)
class PassLimits:
    """What a forward pass takes at most: rows, or tokens in their place."""

    most_rows: int
    most_tokens: int | None = None

    def halved(self, rows: int, tokens: int) -> "PassLimits":
        """Half of them, or of what the largest pass has where that is less."""
        if self.most_tokens is None:
            return PassLimits(max(1, min(self.most_rows, rows) // 2))
        return PassLimits(self.most_rows, max(1, min(self.most_tokens, tokens) // 2))

    def __str__(self) -> str:
        """In words."""
        return f"{self.most_rows} rows" if self.most_tokens is None else f"{self.most_tokens:,} tokens"


@dataclass(frozen=True)
class Trial:
    """The costliest passes of a run within some limits.

    Attributes:
        rows: of the largest pass, in whatever process.
        tokens: of the same pass.
        run: runs this process's passes; raises torch's error where its memory is full.
    """

    rows: int
    tokens: int
    run: Callable[[], None]


def halve_until_fit(limits: PassLimits, trial: Callable[[PassLimits], Trial], accelerator: Any) -> PassLimits:
    """The limits, halved until their trial fits into the memory of every process; one line of the log says so.

    Raises:
        TrainingError: one row does not fit.
    """
    found, reason = limits, ""
    while True:
        tried = trial(found)
        problem = _obstacle(tried.run)
        if not any_process(problem is not None, accelerator):
            break
        reason = reason or problem or "out of memory in another process"
        if tried.rows <= 1:
            raise TrainingError(
                f"one row at a time, {tried.tokens:,} tokens, does not fit ({reason}): set "
                "passes.checkpoint_responses: true or quantize: 4bit, or lower max_query_tokens or max_response_tokens"
            )
        release_memory()
        found = found.halved(tried.rows, tried.tokens)
    if found == limits:
        log.info("forward passes of at most %s: the costliest step fits into memory", limits)
    else:
        log.warning("forward passes of at most %s, since %s do not fit (%s)", found, limits, reason)
    return found


def _obstacle(run: Callable[[], None]) -> str | None:
    """Why memory does not suffice; None where it does. The error itself would keep the tensors of the trial."""
    try:
        run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return device_memory_error(error).message
    return None
