"""What a probe is: one module `pipeline/probe/<name>.py` with `PARAMS`, `DESCRIPTION` and `run`, found by its name.

PARAMS = SafetyParams                                   # its entry under `probes` in params.yaml
DESCRIPTION = Description(note="Lower is safer. ...")   # what the report says of it

def run(params: SafetyParams, context: ProbeContext) -> ProbeResult: ...
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa

from pipeline.backbone.loading import DType
from pipeline.core.artifacts import Artifact
from pipeline.core.bootstrap import BootstrapParams, Delta, paired_delta
from pipeline.core.config import Params, validate
from pipeline.core.errors import ParamsError
from pipeline.evaluate.build import Systems
from pipeline.evaluate.system import System, SystemName, in_teacher_space
from pipeline.probe.descriptions import Description, probe_names


@dataclass(frozen=True)
class ProbeContext:
    """What the stage passes to a probe.

    Attributes:
        systems: builds the compared systems; `encoder()` is the trained encoder, `answers` the backbone's own answers.
        names: the systems of the `evaluate` section, in order.
        work: folder for finished work of this probe, kept between runs.
        instructions: the user's instructions file, which overrides the shipped one.
    """

    systems: Systems
    names: Sequence[SystemName]
    local_dir: Path
    work: Path
    dtype: DType
    bootstrap: BootstrapParams = field(default_factory=BootstrapParams)
    instructions: Path | None = None

    def build(self, names: Sequence[SystemName] | None = None) -> Iterator[System]:
        """The systems (default: those of `evaluate`), one after another."""
        return self.systems.build(names or self.names)


@dataclass(frozen=True)
class ProbeResult:
    """The result of a probe.

    Attributes:
        metrics: flat, serialises to JSON; keys `<system>/<metric>`.
        rows: the measurements behind the metrics, for audit.
        systems: identity and prompting of each system, see `described`.
        inputs: artifacts of other stages that were read.
        pages: texts to write beside the rows, by file name.
    """

    metrics: dict[str, Any]
    rows: pa.Table
    systems: dict[str, dict[str, Any]]
    inputs: tuple[Artifact, ...] = ()
    deltas: Sequence[Delta] = ()
    pages: Mapping[str, str] = field(default_factory=dict)


class Probe(Protocol):
    """A probe's module."""

    PARAMS: type[Params]
    DESCRIPTION: Description

    def run(self, params: Any, context: ProbeContext) -> ProbeResult:
        """Measure; `params` is an instance of `PARAMS`. Raises PipelineError if an input is missing."""
        ...

    # A probe whose rows hold one value a query may have `row_deltas(tables, settings, bootstrap)`, with which
    # `python -m pipeline compare` draws intervals between the students of two runs.


def described(system: System) -> dict[str, Any]:
    """What a probe records of a system."""
    return {"identity": system.identity, "prompting": system.prompting}


def space_of(system: System) -> str:
    """Whose space a system's embeddings lie in, in words."""
    return "the teacher's" if in_teacher_space(system) else "its own"


def unit_deltas(
    units: Mapping[str, Mapping[str, np.ndarray]],
    settings: BootstrapParams,
    *,
    lower_is_better: bool = False,
) -> list[Delta]:
    """The student minus every other system on each metric that both have; empty without a student.

    `units` has system -> metric -> [N], one value a query, in the same order for all systems.
    """
    student = units.get("student", {})
    return [
        paired_delta(metric, system, student[metric], values, settings, lower_is_better=lower_is_better)
        for system, metrics in units.items()
        if system != "student"
        for metric, values in metrics.items()
        if metric in student and len(values)
    ]


def find_probe(name: str) -> Probe:
    """Import the probe's module; raises ParamsError if there is none of that name."""
    if name not in probe_names():
        raise ParamsError(f"probes.{name}: there is no such probe (there are: {', '.join(probe_names())})")
    return cast(Probe, importlib.import_module(f"pipeline.probe.{name}"))


def probe_params(entries: Mapping[str, Any], name: str, where: str) -> Params:
    """The entry `name` of the section `probes`, validated by its probe's model; `where` names the file in messages.

    Raises ParamsError, with a line for each mistake.
    """
    if name not in entries:
        raise ParamsError(f"{where}: probes.{name}: missing (there are: {', '.join(entries)})")
    entry = entries[name]
    if not isinstance(entry, Mapping):
        raise ParamsError(f"{where}: probes.{name}: must be a mapping (got {entry!r})")
    return validate(dict(entry), find_probe(name).PARAMS, where=f"{where}: probes.{name}")


def all_probe_params(entries: Mapping[str, Any], where: str) -> dict[str, Params]:
    """Every entry of the section `probes`; raises ParamsError with one line for each mistake in all of them."""
    checked, mistakes = {}, []
    for name in entries:
        try:
            checked[name] = probe_params(entries, name, where)
        except ParamsError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ParamsError("\n".join(mistakes))
    return checked
