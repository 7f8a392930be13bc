"""The stages of a workspace as a graph: what each made, and whether it is still valid."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.audit.chain import stale_inputs
from pipeline.audit.findings import Finding
from pipeline.audit.lock import LOCK
from pipeline.core.artifacts import MANIFEST, read_manifest
from pipeline.core.errors import ArtifactError
from pipeline.core.paths import EVALUATE_DIR, PROBE_DIR, STAGE_ARTIFACTS
from pipeline.report.sections import trained_here


class State(StrEnum):
    """The state of a stage's artifact; the worst one that applies is shown."""

    MADE = "made"
    VERIFIED = "made, verified"
    STUB = "stub"
    OUT_OF_DATE = "out of date"
    MISSING = "missing"
    FAILED = "failed verification"


# For readers who do not see colours.
MARKS = {State.MISSING: "○", State.OUT_OF_DATE: "↻", State.STUB: "▲", State.FAILED: "✗"}


@dataclass(frozen=True)
class Node:
    """A stage and its artifact; `digest` is its manifest's, `reasons` explain a state other than made."""

    stage: str
    artifact: str
    state: State
    digest: str = ""
    rows: int = 0
    reasons: Sequence[str] = field(default_factory=list)

    @property
    def mark(self) -> str:
        return MARKS.get(self.state, "✓")


def pipeline_graph(
    root: Path,
    suites: Iterable[str],
    probes: Iterable[str],
    *,
    stubs: Collection[str],
    findings: Sequence[Finding] | None,
) -> list[list[Node]]:
    """The stages in the order of the pipeline; those of one list do not depend on each other.

    `stubs` are stages and artifacts made by a stub, `findings` those of an audit (None: not run).
    """
    last = {f"evaluate {name}": (EVALUATE_DIR / name).as_posix() for name in suites}
    last |= {f"probe {name}": (PROBE_DIR / name).as_posix() for name in probes}
    known: dict[str, Node] = {}
    chain = chain_of(root)
    for stage, artifact in (chain | last).items():
        known[artifact] = _node(root, stage, artifact, known, bool({stage, artifact} & set(stubs)), findings)
    results = [known[artifact] for artifact in last.values()]
    return [[known[artifact]] for artifact in chain.values()] + ([results] if results else [])


def chain_of(root: Path) -> dict[str, str]:
    """The stages up to the encoder with their artifacts; teach only if it was asked for a teacher."""
    return {stage: path.as_posix() for stage, path in STAGE_ARTIFACTS.items() if stage != "teach" or trained_here(root)}


def _node(
    root: Path, stage: str, name: str, known: Mapping[str, Node], stub: bool, findings: Sequence[Finding] | None
) -> Node:
    wrong = [_short(finding) for finding in findings or () if _about(finding, name) and not finding.stale]
    try:
        artifact = read_manifest(root / name)
    except ArtifactError as error:
        gone = not (root / name / MANIFEST).is_file()
        reasons = wrong if gone else [str(error)]
        return Node(stage, name, State.MISSING if gone else State.FAILED, reasons=reasons)
    changed = stale_inputs(root, artifact)
    outdated = [f"{path} was made anew since" for path in changed]
    outdated += [_short(finding) for finding in findings or () if _about(finding, name) and finding.of_source]
    upstream = (path for path in artifact.manifest.inputs if path in known and path not in changed)
    outdated += [f"{path} is out of date" for path in upstream if known[path].state == State.OUT_OF_DATE]
    states: dict[State, Any] = {State.FAILED: wrong, State.OUT_OF_DATE: outdated, State.STUB: stub}
    valid = State.MADE if findings is None else State.VERIFIED
    state = next((state for state, applies in states.items() if applies), valid)
    reasons = [*wrong, *outdated, *(["made by a stub"] if stub else [])]
    return Node(stage, name, state, artifact.digest, artifact.manifest.rows, reasons)


def _about(finding: Finding, name: str) -> bool:
    return finding.artifact == name or (finding.artifact == LOCK and finding.where == name)


def _short(finding: Finding) -> str:
    return " ".join(f"{finding.where} {finding.what}".split())
