"""Gathers what the report says from manifests and results. Whatever is missing is listed, nothing is guessed.

The suites and probes come from params, never from the folders: a removed entry leaves files behind.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core.artifacts import read_manifest
from pipeline.core.errors import ArtifactError
from pipeline.core.paths import ENCODER_DIR, EVALUATE_DIR, HELDOUT_CURVE, LOSS_CURVE, PROBE_DIR, RESULTS_DIR
from pipeline.evaluate.comparison import Comparison, compare
from pipeline.probe.descriptions import describe
from pipeline.report.cost import Machine, StageRun, machines, stage_run
from pipeline.report.graph import Node, chain_of, pipeline_graph
from pipeline.report.published import AgainstPaper, Measured, against_paper, load_published
from pipeline.report.sections import (
    Checked,
    Provenance,
    Sample,
    SystemFacts,
    TeacherFacts,
    provenance,
    read_samples,
    system_facts,
    teacher_facts,
)


@dataclass
class Content:
    """Everything that the templates print."""

    title: str
    checked: Checked | None = None
    params: str = ""
    graph: list[list[Node]] = field(default_factory=list)
    stubs: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    models: list[tuple[str, str, str]] = field(default_factory=list)
    data: list[tuple[str, int, str]] = field(default_factory=list)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[StageRun] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    training: list[tuple[str, Any]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    heldout: list[dict[str, float]] = field(default_factory=list)
    teacher: TeacherFacts | None = None
    systems: list[SystemFacts] = field(default_factory=list)
    alignment: Comparison | None = None
    suites: list[Comparison] = field(default_factory=list)
    probes: list[Comparison] = field(default_factory=list)
    paper: AgainstPaper = field(default_factory=AgainstPaper)
    samples: list[Sample] = field(default_factory=list)


def gather(
    title: str,
    suites: Mapping[str, Any],
    probes: Mapping[str, Any],
    root: Path = Path(),
    *,
    checked: Checked | None = None,
    params: str = "",
) -> Content:
    """The content of the report on the workspace `root`.

    Args:
        title: of the page.
        suites: that section of params.yaml.
        probes: that section of params.yaml.
        root: the workspace.
        checked: an audit of it, None where none was run.
        params: text of the params file.

    Raises:
        ParamsError: the file of published figures is damaged.
    """
    content = Content(title, checked, params)
    for stage, artifact in chain_of(root).items():
        _add_artifact(content, root, artifact)
        _record(content, root / RESULTS_DIR / f"{stage}.json", stage)
    content.teacher = teacher_facts(root, content.records.get("teach"))
    _add_training(content, content.records.get("train"))
    content.curve = _curve(content, root / LOSS_CURVE)
    content.heldout = _curve(content, root / HELDOUT_CURVE)
    measured = [*_add_suites(content, root, suites), *_add_probes(content, root, probes)]
    content.paper = against_paper(load_published(), _backbone(root), measured)
    content.machines = machines(content.records)
    findings = checked.findings if checked else None
    content.graph = pipeline_graph(root, suites, probes, stubs=content.stubs, findings=findings)
    content.provenance = provenance(root, [node.artifact for level in content.graph for node in level])
    return content


def _add_suites(content: Content, root: Path, suites: Mapping[str, Any]) -> list[Measured]:
    measured = []
    for name, settings in suites.items():
        if record := _record(content, root / EVALUATE_DIR / f"{name}.json", f"evaluate {name}"):
            comparison = _without_known_prompting(content, compare(name, record), record)
            content.suites.append(comparison)
            measured.append(Measured(comparison, settings))
    return measured


def _add_probes(content: Content, root: Path, probes: Mapping[str, Any]) -> list[Measured]:
    measured = []
    for name, settings in probes.items():
        if record := _record(content, root / PROBE_DIR / f"{name}.json", f"probe {name}"):
            comparison = compare(name, record, describe(name).lower_is_better)
            if not describe(name).instructed:
                comparison = replace(comparison, prompting={})
            comparison = _without_known_prompting(content, comparison, record)
            _add_probe(content, root, comparison)
            measured.append(Measured(comparison, settings))
    return measured


def _without_known_prompting(content: Content, comparison: Comparison, record: Mapping[str, Any]) -> Comparison:
    """Every system is described once; a table repeats only a prompting that is not the one described."""
    content.systems = system_facts(content.systems, comparison, record)
    known = {facts.name: facts.prompting for facts in content.systems}
    other = {name: what for name, what in comparison.prompting.items() if what != known[name]}
    return replace(comparison, prompting=other)


def _backbone(root: Path) -> str | None:
    """The name of the trained encoder's backbone, None without an encoder."""
    try:
        identity = read_manifest(root / ENCODER_DIR).manifest.models.get("backbone")
    except ArtifactError:
        return None
    return str(identity["name"]) if isinstance(identity, dict) and "name" in identity else None


def _add_artifact(content: Content, root: Path, name: str) -> None:
    try:
        artifact = read_manifest(root / name)
    except ArtifactError as error:
        content.missing.append(str(error))
        return
    manifest = artifact.manifest
    content.data.append((name, manifest.rows, _counts(manifest.counts)))
    for role, identity in manifest.models.items():
        known = {found for found, _, _ in content.models}
        if role not in known and isinstance(identity, dict) and {"name", "kind"} & identity.keys():
            content.models.append((role, *_named(identity)))
    if stub := _stub({"params": manifest.params, "models": manifest.models}):
        _add_stub(content, name, stub)


def _counts(counts: Mapping[str, Any]) -> str:
    """Counts as text; the nested ones (per source) only by their total."""
    flat = counts.get("all", counts)
    return ", ".join(f"{key} {value:,}" for key, value in flat.items() if isinstance(value, int) and value)


def _named(identity: Mapping[str, Any]) -> tuple[str, str]:
    """A model's name and what pins it."""
    pin = identity.get("revision") or identity.get("sha256") or "not pinned"
    own = [f"{key} {value}" for key, value in identity.items() if key in ("kind", "pooling", "max_tokens")]
    return str(identity.get("name", identity.get("kind", "?"))), ", ".join([str(pin)[:16], *own])


def _stub(value: Any) -> bool:
    """Whether `stub: true` stands anywhere in a manifest or record."""
    if isinstance(value, dict):
        return bool(value.get("stub")) or any(_stub(inner) for inner in value.values())
    return any(_stub(inner) for inner in value) if isinstance(value, list) else False


def _add_stub(content: Content, where: str, stub: bool) -> None:
    if stub and where not in content.stubs:
        content.stubs.append(where)


def _record(content: Content, path: Path, name: str) -> dict[str, Any] | None:
    """A stage's record; its run is added to the time table."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        content.missing.append(f"{path}: not made yet")
        return None
    except ValueError as error:
        content.missing.append(f"{path} is damaged ({error})")
        return None
    if not isinstance(record, dict):
        content.missing.append(f"{path} is damaged (no record)")
        return None
    content.records[name] = record
    content.runs.append(stage_run(name, record))
    _add_stub(content, name, _stub(record))
    return record


def _add_training(content: Content, record: Mapping[str, Any] | None) -> None:
    for key, value in (record or {}).items():
        if key in ("stage", "seconds", "started", "peak_memory_mib", "environment"):
            continue
        if isinstance(value, dict):
            value = ", ".join(
                f"{name} {number:.4g}" for name, number in value.items() if isinstance(number, int | float)
            )
        content.training.append((key.replace("_", " "), value))


def _curve(content: Content, path: Path) -> list[dict[str, float]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        content.missing.append(f"{path}: not made yet")
        return []
    except (ValueError, TypeError) as error:
        content.missing.append(f"{path} is damaged ({error})")
        return []


def _add_probe(content: Content, root: Path, comparison: Comparison) -> None:
    if comparison.name == "alignment":
        content.alignment = comparison
        return
    content.probes.append(comparison)
    if comparison.name == "interpret":
        try:
            content.samples = read_samples(root / PROBE_DIR / "interpret")
        except ArtifactError as error:
            content.missing.append(str(error))
