"""The loop of a measured process: orders come in on stdin, one JSON object a line, answers go out on stdout."""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.reference.meter import Meter
from bench.reference.serving import arguments, claim_stdout, orders, write
from bench.training_step.widening import widened
from bench.training_step.workload import Rows, load

Arrays = dict[str, "np.ndarray[Any, Any]"]


class Side(Protocol):
    """One implementation of a training step, loaded."""

    def step(self, index: int, rows: Rows) -> float:
        """Forward, backward and update on a batch; returns the loss."""
        ...

    def gradients(self, index: int, rows: Rows) -> tuple[float, Arrays]:
        """Loss and the gradients by name, without an update."""
        ...

    def targets(self, rows: Rows) -> "np.ndarray[Any, Any]":
        """Teacher's embeddings of a batch's responses, `[B, e]`."""
        ...


def serve(build: Callable[[argparse.Namespace], Side]) -> None:
    """Load a side, then follow orders until stdin ends."""
    settings = arguments()
    replies = claim_stdout()
    batches = load(settings.work / "batches.json")
    side = build(settings)
    meter = Meter(settings.device)
    write(replies, meter.memory())
    with widened() if settings.dtype == "fp64" else contextlib.nullcontext():
        for order in orders():
            write(replies, _follow(order, side, meter, batches, settings.work))


def _follow(order: dict[str, Any], side: Side, meter: Meter, batches: list[Rows], work: Path) -> dict[str, Any]:
    """Do one order: `steps` over batches, `gradients` of a batch, `targets` of all, or `memory`."""
    match order["do"]:
        case "steps":
            return {"steps": [_measured_step(side, meter, index, batches[index]) for index in order["batches"]]}
        case "gradients":
            loss, gradients = side.gradients(order["batch"], batches[order["batch"]])
            wide: dict[str, Any] = {name: value.astype(np.float64) for name, value in gradients.items()}
            np.savez(work / order["file"], **wide)
            return {"loss": loss}
        case "targets":
            np.savez(work / order["file"], *[side.targets(rows) for rows in batches])
            return {}
        case "memory":
            return meter.memory()
        case unknown:
            raise ValueError(f"no order is called {unknown}")


def _measured_step(side: Side, meter: Meter, index: int, rows: Rows) -> dict[str, float]:
    meter.start()
    loss = side.step(index, rows)
    return {"loss": loss, **meter.stop()}
