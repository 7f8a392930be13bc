"""The GPUs or cores of one machine, divided among worker processes."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from pydantic import Field

from pipeline.core.errors import PipelineError
from pipeline.core.run import DEVICE_VARIABLE, own_cores

log = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=1)] | Literal["auto"]
# Of work that a Ray cluster can share too.
Spread = Count | Literal["ray"]
RAY: Final = "ray"


@dataclass(frozen=True)
class Device:
    """What one worker runs on: a name for people, additions to its environment, the cores that it is bound to."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()


# Where workers run: on these devices of this machine, or on a Ray cluster.
Places = Sequence[Device] | Literal["ray"]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them (indices or UUIDs).

    Empty with PIPELINE_DEVICE=cpu.
    """
    if os.environ.get(DEVICE_VARIABLE) == "cpu":
        return []
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",")][:count] if named.strip() else list(map(str, range(count)))


def worker_count(processes: Count, *, gpus_each: int, error: type[PipelineError], on_cpu: bool = False) -> int:
    """How many workers to start; "auto" is one for each group of `gpus_each` visible GPUs, and one on a CPU.

    `on_cpu`: they use no GPU, whether there is one or not.

    Raises:
        PipelineError: `error`, about the argument `processes`, if there are too few GPUs.
    """
    gpus = 0 if on_cpu else len(visible_gpus())
    if processes == "auto":
        count = max(1, gpus // gpus_each)
        why = f"{gpus} visible GPUs, {gpus_each} each" if gpus else "no GPU found: one process uses all cores"
        log.info("processes: auto = %d (%s)", count, why)
        return count
    if gpus and processes * gpus_each > gpus:
        raise error(
            f"{processes} with {gpus_each} GPU(s) each, but {gpus} GPU(s) are visible (CUDA_VISIBLE_DEVICES): set it "
            f"to at most {gpus // gpus_each}, or to auto",
            argument="processes",
        )
    return processes


def places_for(processes: Spread, *, error: type[PipelineError]) -> Places | None:
    """Where the workers of `processes` run, each with a GPU of its own; None: in this process.

    Raises:
        PipelineError: as `worker_count`.
    """
    if processes == RAY:
        return RAY
    count = worker_count(processes, gpus_each=1, error=error)
    return None if count == 1 else split_devices(count)


def split_devices(count: int, gpus_each: int = 1, *, on_cpu: bool = False) -> list[Device]:
    """Disjoint groups of the visible GPUs for `count` workers, or of the cores where there is no GPU or `on_cpu`.

    More workers than cores share cores.
    """
    gpus, cores = [] if on_cpu else visible_gpus(), own_cores()
    threads = max(1, min(len(cores) // count, int(os.environ.get("OMP_NUM_THREADS") or len(cores))))
    devices = []
    for index in range(count):
        environment = {"TQDM_DISABLE": "1"} if index else {}
        if gpus:
            names = ",".join(gpus[index * gpus_each : (index + 1) * gpus_each])
            devices.append(Device(f"GPU {names}", environment | {"CUDA_VISIBLE_DEVICES": names}))
        else:
            mine = cores[index * len(cores) // count : (index + 1) * len(cores) // count] or [cores[index % len(cores)]]
            environment |= {"OMP_NUM_THREADS": str(threads)}
            devices.append(Device(f"cores {_span(mine)}", environment, tuple(mine)))
    return devices


def _span(cores: Sequence[int]) -> str:
    adjacent = len(cores) > 1 and cores[-1] - cores[0] == len(cores) - 1
    return f"{cores[0]}-{cores[-1]}" if adjacent else ",".join(map(str, cores))
