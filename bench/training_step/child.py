"""The loop of a measured process: orders come in on stdin, one JSON object a line, answers go out on stdout."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bench.training_step.meter import Meter
from bench.training_step.widening import widened
from bench.training_step.workload import Rows, load

Arrays = dict[str, "np.ndarray[Any, Any]"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


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


def arguments() -> argparse.Namespace:
    """What every measured process is told: workspace folder, precision, device, variant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dtype", choices=[*DTYPES], required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--variant", default="fast")
    return parser.parse_args()


def serve(build: Callable[[argparse.Namespace], Side]) -> None:
    """Load a side, then follow orders until stdin ends."""
    settings = arguments()
    replies = _claim_stdout()
    batches = load(settings.work / "batches.json")
    side = build(settings)
    meter = Meter(settings.device)
    _write(replies, meter.memory())
    with widened() if settings.dtype == "fp64" else contextlib.nullcontext():
        for order in _orders():
            _write(replies, _follow(order, side, meter, batches, settings.work))


def _claim_stdout() -> int:
    """Keep stdout for answers: what libraries print goes to stderr."""
    replies = os.dup(1)
    os.dup2(2, 1)
    return replies


def _orders() -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in sys.stdin)


def _write(replies: int, answer: Mapping[str, Any]) -> None:
    os.write(replies, (json.dumps(answer) + "\n").encode())


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
