"""Time, GPUs, tokens and memory of each stage, from the records of the runs alone; nothing is estimated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StageRun:
    """One run of a stage; None: not recorded.

    Attributes:
        gpus: GPUs that it saw; in training, one per process.
        peak_memory_mib: of the largest process.
        gpu_memory_mib: of the fullest GPU.
    """

    name: str
    seconds: float
    started: str
    gpus: int
    work: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    peak_memory_mib: int | None = None
    gpu_memory_mib: int | None = None

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600


@dataclass(frozen=True)
class Machine:
    """The hardware and software that some stages ran on."""

    stages: list[str] = field(default_factory=list)
    hardware: str = ""
    python: str = ""
    git_revision: str = ""
    versions: str = ""


def stage_run(name: str, record: Mapping[str, Any]) -> StageRun:
    """The cost in a record."""
    return StageRun(
        name=name,
        seconds=float(record.get("seconds", 0.0)),
        started=str(record.get("started", "")),
        gpus=_gpus(record),
        work=_work(record),
        tokens_in=_first({**_mapping(record.get("training")), **record}, "prompt_tokens", "computed_tokens", "tokens"),
        tokens_out=_first(record, "response_tokens"),
        peak_memory_mib=record.get("peak_memory_mib"),
        gpu_memory_mib=_gpu_memory(record),
    )


def total(runs: Sequence[StageRun], attribute: str) -> float | None:
    """Sum of an attribute over the runs; None if no run has it."""
    known = [value for run in runs if (value := getattr(run, attribute)) is not None]
    return sum(known) if known else None


def machines(records: Mapping[str, Mapping[str, Any]]) -> list[Machine]:
    """The distinct environments in the stages' records."""
    found: dict[tuple[str, ...], list[str]] = {}
    for stage, record in records.items():
        found.setdefault(_environment(_mapping(record.get("environment"))), []).append(stage)
    return [Machine(stages, *facts) for facts, stages in found.items()]


def _environment(environment: Mapping[str, Any]) -> tuple[str, ...]:
    units = {"cores": "cores", "memory_gib": "GiB"}
    size = [f"{environment[key]} {unit}" for key, unit in units.items() if environment.get(key)]
    versions = _mapping(environment.get("versions"))
    return (
        ", ".join([*_counted(environment.get("gpus") or ["no GPU"]), *size]) if environment else "",
        str(environment.get("python") or ""),
        str(environment.get("git_revision") or ""),
        ", ".join(f"{library} {version}" for library, version in versions.items()),
    )


def _counted(names: Sequence[str]) -> list[str]:
    return [f"{names.count(name)} x {name}" if names.count(name) > 1 else str(name) for name in dict.fromkeys(names)]


def _gpus(record: Mapping[str, Any]) -> int:
    seen = len(_mapping(record.get("environment")).get("gpus") or [])
    processes = record.get("processes")
    return min(seen, processes) if isinstance(processes, int) else seen


def _work(record: Mapping[str, Any]) -> str:
    if isinstance(tasks := record.get("tasks"), int):
        return f"{tasks:,} tasks"
    rows = _first(record, "computed_rows", "rows")
    if rows is None:
        kept = _mapping(_mapping(record.get("counts")).get("all"))
        rows = kept["train"] + kept.get("heldout", 0) if isinstance(kept.get("train"), int) else None
    reused = record.get("reused_rows")
    from_before = f", {reused:,} kept from before" if isinstance(reused, int) and reused else ""
    return "" if rows is None else f"{rows:,} rows{from_before}"


def _gpu_memory(record: Mapping[str, Any]) -> int | None:
    peak = _mapping(record.get("training")).get("peak_gpu_memory_mib")
    used = [*_mapping(record.get("gpu_memory_mib")).values(), *([peak] if isinstance(peak, int) else [])]
    return max(used, default=None)


def _first(record: Mapping[str, Any], *keys: str) -> int | None:
    return next((record[key] for key in keys if isinstance(record.get(key), int)), None)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
