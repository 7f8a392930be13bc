"""Where the worker processes of one machine run: how many there are, and which GPUs or cores each gets."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.errors import PipelineError

log = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=1)] | Literal["auto"]


@dataclass(frozen=True)
class Place:
    """Where a worker runs: its name for people, what its environment adds, and the cores it is bound to, if any."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them (indices or UUIDs)."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",")][:count] if named.strip() else list(map(str, range(count)))


def own_cores() -> list[int]:
    """The cores that this process may use, as the operating system numbers them."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def worker_count(wanted: Count, *, gpus_each: int, knob: str, error: type[PipelineError]) -> int:
    """How many workers to start; "auto" is one for each group of `gpus_each` visible GPUs, and one on a CPU.

    Args:
        wanted: a number, or "auto".
        gpus_each: GPUs that one worker takes.
        knob: the params key of `wanted`, for messages.
        error: raised if there are too few GPUs.
    """
    gpus = len(visible_gpus())
    if wanted == "auto":
        count = max(1, gpus // gpus_each)
        why = f"{gpus} visible GPUs, {gpus_each} each" if gpus else "no GPU found: one process uses all cores"
        log.info("%s: auto = %d (%s)", knob, count, why)
        return count
    if gpus and wanted * gpus_each > gpus:
        raise error(
            f"{knob} is {wanted} with {gpus_each} GPU(s) each, but {gpus} GPU(s) are visible "
            f"(CUDA_VISIBLE_DEVICES): set it to at most {gpus // gpus_each}, or to auto"
        )
    return wanted


def places(count: int, gpus_each: int = 1) -> list[Place]:
    """Disjoint groups of the visible GPUs for `count` workers, or of the cores where there is no GPU.

    With more workers than cores, cores are shared.
    """
    gpus, cores = visible_gpus(), own_cores()
    threads = max(1, min(len(cores) // count, int(os.environ.get("OMP_NUM_THREADS") or len(cores))))
    found = []
    for index in range(count):
        environment = {"OMP_NUM_THREADS": str(threads)} | ({"TQDM_DISABLE": "1"} if index else {})
        if gpus:
            names = ",".join(gpus[index * gpus_each : (index + 1) * gpus_each])
            found.append(Place(f"GPU {names}", environment | {"CUDA_VISIBLE_DEVICES": names}))
        else:
            mine = cores[index * len(cores) // count : (index + 1) * len(cores) // count] or [cores[index % len(cores)]]
            found.append(Place(f"cores {_span(mine)}", environment, tuple(mine)))
    return found


def _span(cores: Sequence[int]) -> str:
    together = len(cores) > 1 and cores[-1] - cores[0] == len(cores) - 1
    return f"{cores[0]}-{cores[-1]}" if together else ",".join(map(str, cores))
