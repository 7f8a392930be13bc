"""What a probe is: one module `pipeline/probe/<name>.py` with `PARAMS`, `DESCRIPTION` and `run`, found by its name.

    PARAMS = SafetyParams                                   # its entry under `probes` in params.yaml
    DESCRIPTION = Description(note="Lower is safer. ...")   # what the report says of it

    def run(params: SafetyParams, context: ProbeContext) -> ProbeResult: ...

The stage `python -m pipeline.probe NAME` imports that module and no other probe.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import pyarrow as pa

from pipeline.backbone.loading import DType
from pipeline.core.artifacts import Artifact
from pipeline.core.bootstrap import BootstrapParams, Delta, paired_delta
from pipeline.core.config import Params, validate
from pipeline.core.errors import EvaluationError, ParamsError
from pipeline.evaluate.build import Systems
from pipeline.evaluate.system import System, SystemName
from pipeline.probe.descriptions import Description, probe_names

if TYPE_CHECKING:
    import numpy as np

# Every other system embeds references and answers itself: a mean of hidden states has no place in the teacher's space.
_TEACHER_SPACE = frozenset({"student", "teacher", "untrained", "hyde"})

# Texts in, the backbone's own answers out, None where the engine failed.
Answering = Callable[[Sequence[str]], list[str | None]]


def _no_answers() -> Answering:
    raise EvaluationError("the backbone cannot answer here: this run was given no engine")


@dataclass(frozen=True)
class ProbeContext:
    """What the stage gives a probe.

    Attributes:
        systems: builds the compared systems; `systems.encoder()` is the trained encoder itself.
        names: the systems of the `evaluate` section, in order.
        local_dir: where local task folders are.
        work: a folder for finished work of this probe, kept between runs.
        batch_size: texts in one forward pass.
        dtype: precision of the systems.
        bootstrap: how the intervals of differences are drawn.
        instructions: the user's instructions file over the shipped one.
        answers: gives what answers texts as the backbone does, by the engine of the section `generate`.
    """

    systems: Systems
    names: Sequence[SystemName]
    local_dir: Path
    work: Path
    batch_size: int
    dtype: DType
    bootstrap: BootstrapParams = field(default_factory=BootstrapParams)
    instructions: Path | None = None
    answers: Callable[[], Answering] = _no_answers

    def build(self, names: Sequence[SystemName] | None = None) -> Iterator[System]:
        """The systems (default: those of `evaluate`), one after another."""
        return self.systems.build(names or self.names)


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        metrics: flat, serialises to JSON; keys `<system>/<metric>`.
        rows: the single findings behind the metrics, for audit.
        systems: identity and prompting of each system, see `described`.
        inputs: artifacts of other stages that were read.
        deltas: student minus every other system, where the student is among them.
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
        """Measure; `params` is an instance of `PARAMS`.

        Raises:
            PipelineError: what it needs is missing.
        """
        ...


def described(system: System) -> dict[str, Any]:
    """A system's entry in `ProbeResult.systems`."""
    return {"identity": system.identity, "prompting": system.prompting}


def in_teacher_space(system: System) -> bool:
    """Whether a system's embeddings lie among the teacher's; else it embeds what they are compared with itself."""
    return system.name in _TEACHER_SPACE or system.name.startswith("untrained-")


def space_of(system: System) -> str:
    """The space in which a system is measured, in words."""
    return "the teacher's" if in_teacher_space(system) else "its own"


def unit_deltas(
    units: "Mapping[str, Mapping[str, np.ndarray[Any, Any]]]",
    settings: BootstrapParams,
    *,
    lower_is_better: bool = False,
) -> list[Delta]:
    """The student against every other system on each metric that both have; none without a student.

    Args:
        units: system -> metric -> [N], one value a query, in the same order for all systems.
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
    """The probe's module.

    Raises:
        ParamsError: there is none of that name.
    """
    if name not in probe_names():
        raise ParamsError(f"probes.{name}: there is no such probe (there are: {', '.join(probe_names())})")
    return cast(Probe, importlib.import_module(f"pipeline.probe.{name}"))


def probe_params(entries: Mapping[str, Any], name: str, where: str) -> Params:
    """The entry `name` of the section `probes` in its probe's own model; `where` names the file in messages.

    Raises:
        ParamsError: no such entry or probe, or with one line for each mistake in the entry.
    """
    if name not in entries:
        raise ParamsError(f"{where}: probes.{name}: missing (there are: {', '.join(entries)})")
    entry = entries[name]
    if not isinstance(entry, Mapping):
        raise ParamsError(f"{where}: probes.{name}: must be a mapping (got {entry!r})")
    return validate(dict(entry), find_probe(name).PARAMS, where=f"{where}: probes.{name}")


def all_probe_params(entries: Mapping[str, Any], where: str) -> dict[str, Params]:
    """Every entry of the section `probes`.

    Raises:
        ParamsError: with one line for each mistake in all of them.
    """
    checked, mistakes = {}, []
    for name in entries:
        try:
            checked[name] = probe_params(entries, name, where)
        except ParamsError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ParamsError("\n".join(mistakes))
    return checked
