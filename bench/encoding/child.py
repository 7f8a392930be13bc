"""The loop of a process that encodes; it also says what each call took."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.reference.meter import Meter
from bench.reference.serving import arguments, claim_stdout, orders, write

BATCH = 32
WORKLOADS = "workloads.json"


class Side(Protocol):
    """One implementation, loaded."""

    def encode(self, texts: list[str], instruction: str, way: str) -> "np.ndarray[Any, Any]":
        """Embeddings float32 `[N, d]` in the order of the texts; `way` is one of those that the side knows."""
        ...


def serve(build: Callable[[argparse.Namespace], Side]) -> None:
    """Load a side, then encode what is ordered until stdin ends."""
    settings = arguments()
    replies = claim_stdout()
    side = build(settings)
    workloads = json.loads((settings.work / WORKLOADS).read_text(encoding="utf-8"))
    meter = Meter(settings.device)
    write(replies, meter.memory())
    for order in orders():
        if order["do"] == "memory":
            write(replies, meter.memory())
        else:
            workload = workloads[order["workload"]]
            write(replies, _measured(side, meter, workload, order["way"], settings.work / order["file"]))


def _measured(side: Side, meter: Meter, workload: dict[str, Any], way: str, file: Path) -> dict[str, float]:
    meter.start()
    embeddings = side.encode(workload["texts"], workload["instruction"], way)
    taken = meter.stop()
    np.save(file, embeddings)
    return taken
