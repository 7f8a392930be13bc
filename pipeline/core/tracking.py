"""Live figures of a long stage, through accelerate's trackers: DVCLive, TensorBoard, Trackio, Weights & Biases.

They go to `results/live/<stage>`, beside the stage's outs, or to the service; nothing depends on them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from time import monotonic
from typing import Any, Literal

from pipeline.core.errors import ParamsError
from pipeline.core.paths import LIVE_DIR

Tracker = Literal["dvclive", "tensorboard", "trackio", "wandb"]
# Takes figures by name, and the step that they are of.
Log = Callable[[Mapping[str, float], int], None]

# What the services call the runs of all stages together.
PROJECT = "llm2vec-gen"
# Seconds between two figures of a stage that finishes many rows a second.
PROGRESS_SECONDS = 5.0


@contextmanager
def tracking(kind: Tracker | None, stage: str, *, resume: bool) -> Iterator[Log | None]:
    """In the block a function that logs figures of `stage`; None without a tracker.

    For one process of a stage. `resume` goes on with the figures of an earlier run, if DVCLive has any.

    Raises:
        ParamsError: the tracker's package is not installed.
    """
    if kind is None:
        yield None
        return
    if find_spec(kind) is None:
        hint = "pip install 'llm2vec-gen-pipeline[track]'" if kind == "dvclive" else f"pip install {kind}"
        raise ParamsError(f"{kind} is not installed: {hint}, or set it to null", argument="track")
    tracker = _tracker(kind, stage, resume)
    # accelerate would ask its own state which process this is, and that state takes hold of a GPU.
    tracker.main_process_only = False
    tracker.start()
    try:
        yield lambda values, step: tracker.log(
            {name: value for name, value in values.items() if math.isfinite(value)}, step=step
        )
    finally:
        tracker.finish()


def _tracker(kind: Tracker, stage: str, resume: bool) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    folder = LIVE_DIR / stage
    settings: dict[Tracker, dict[str, Any]] = {
        # A dvc.yaml of its own: DVC finds the figures where there are some, and an experiment keeps them.
        "dvclive": {"dir": str(folder), "dvcyaml": str(LIVE_DIR / "dvc.yaml"), "resume": resume, "save_dvc_exp": False},
        "tensorboard": {"run_name": stage, "logging_dir": str(LIVE_DIR)},
        "trackio": {"run_name": PROJECT, "name": stage},
        "wandb": {"run_name": PROJECT, "name": stage},
    }
    return LOGGER_TYPE_TO_CLASS[kind](**settings[kind])


class ProgressLog:
    """Progress of a stage over its rows, at most every `seconds` and with the last row."""

    def __init__(self, log: Log | None, seconds: float = PROGRESS_SECONDS) -> None:
        self._log, self._seconds, self._next = log, seconds, 0.0

    def __call__(self, done: int, total: int, tokens_per_second: float) -> None:
        """Log that `done` of `total` rows are finished; the step is `done`."""
        if self._log is None or (monotonic() < self._next and done < total):
            return
        self._next = monotonic() + self._seconds
        progress = done / total if total else 1.0
        self._log({"rows": done, "progress": progress, "tokens_per_second": tokens_per_second}, done)
