"""Gathers the content of the report from manifests and results. Whatever is missing is listed, nothing is guessed.

Suites and probes are those of the params: files of a removed entry are ignored.
"""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.core.artifacts import read_manifest
from pipeline.core.errors import ArtifactError
from pipeline.core.paths import ENCODER_DIR, EVALUATE_DIR, HELDOUT_CURVE, LOSS_CURVE, PROBE_DIR, RESULTS_DIR
from pipeline.evaluate.comparison import Comparison, compare
from pipeline.probe.descriptions import describe
from pipeline.report.cost import Machine, StageRun, machines, stage_run, total
from pipeline.report.graph import Node, chain_of, pipeline_graph
from pipeline.report.published import Measured, PaperComparison, compare_with_paper, load_published
from pipeline.report.sections import (
    AuditOutcome,
    Provenance,
    Sample,
    SystemFacts,
    TeacherFacts,
    provenance,
    read_samples,
    system_facts,
    teacher_facts,
)
from pipeline.report.verdict import Verdict, verdict


@dataclass
class Content:
    """Everything that the templates print."""

    title: str
    audit: AuditOutcome | None = None
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
    paper: PaperComparison = field(default_factory=PaperComparison)
    samples: list[Sample] = field(default_factory=list)
    verdict: Verdict | None = None


def gather(
    title: str,
    suites: Mapping[str, Any],
    probes: Mapping[str, Any],
    root: Path = Path(),
    *,
    audit: AuditOutcome | None = None,
    params: str = "",
) -> Content:
    """The content of the report on the workspace `root`; raises ParamsError if the published figures are damaged.

    `suites` and `probes` are sections of the params, `params` their whole text; `audit` is None if it was not run.
    """
    content = Content(title, audit, params)
    for stage, artifact in chain_of(root).items():
        _add_artifact(content, root, artifact)
        _record(content, root / RESULTS_DIR / f"{stage}.json", stage)
    content.teacher = teacher_facts(root, content.records.get("teach"))
    _add_training(content, content.records.get("train"))
    content.curve = _read(content, root / LOSS_CURVE, _curve) or []
    content.heldout = _read(content, root / HELDOUT_CURVE, _curve) or []
    measured = []
    for name, settings in suites.items():
        if record := _record(content, root / EVALUATE_DIR / f"{name}.json", f"evaluate {name}"):
            comparison = _without_known_prompting(content, compare(name, record), record)
            content.suites.append(comparison)
            measured.append(Measured(comparison, settings))
    for name, settings in probes.items():
        if record := _record(content, root / PROBE_DIR / f"{name}.json", f"probe {name}"):
            comparison = compare(name, record, describe(name).lower_is_better)
            if not describe(name).instructed:
                comparison = replace(comparison, prompting={})
            comparison = _without_known_prompting(content, comparison, record)
            _add_probe(content, root, comparison)
            measured.append(Measured(comparison, settings))
    content.paper = compare_with_paper(load_published(), _backbone(root), measured)
    content.machines = machines(content.records)
    rows = content.records.get("train", {}).get("rows")
    content.verdict = verdict(content.suites, total(content.runs, "seconds") or 0.0, rows)
    findings = audit.findings if audit else None
    content.graph = pipeline_graph(root, suites, probes, stubs=content.stubs, findings=findings)
    content.provenance = provenance(root, [node.artifact for level in content.graph for node in level])
    return content


def _without_known_prompting(content: Content, comparison: Comparison, record: Mapping[str, Any]) -> Comparison:
    """Describe its systems once for the whole page; the table keeps only a prompting that differs from that."""
    content.systems = system_facts(content.systems, comparison, record)
    known = {facts.name: facts.prompting for facts in content.systems}
    other = {name: prompting for name, prompting in comparison.prompting.items() if prompting != known[name]}
    return replace(comparison, prompting=other)


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


def _backbone(root: Path) -> str | None:
    """The name of the trained encoder's backbone; None without an encoder."""
    try:
        identity = read_manifest(root / ENCODER_DIR).manifest.models.get("backbone")
    except ArtifactError:
        return None
    return str(identity["name"]) if isinstance(identity, dict) and "name" in identity else None


def _add_artifact(content: Content, root: Path, name: str) -> None:
    try:
        manifest = read_manifest(root / name).manifest
    except ArtifactError as error:
        content.missing.append(str(error))
        return
    content.data.append((name, manifest.rows, _counts(manifest.counts)))
    for role, identity in manifest.models.items():
        known = {found for found, _, _ in content.models}
        if role not in known and isinstance(identity, dict) and {"name", "kind"} & identity.keys():
            content.models.append((role, *_name_and_pin(identity)))
    _add_stub(content, name, {"params": manifest.params, "models": manifest.models})


def _counts(counts: Mapping[str, Any]) -> str:
    """Counts as text; of nested ones (per source) only the total."""
    flat = counts.get("all", counts)
    return ", ".join(f"{key} {value:,}" for key, value in flat.items() if isinstance(value, int) and value)


def _name_and_pin(identity: Mapping[str, Any]) -> tuple[str, str]:
    pin = identity.get("revision") or identity.get("sha256") or "not pinned"
    settings = [f"{key} {value}" for key, value in identity.items() if key in ("kind", "pooling", "max_tokens")]
    return str(identity.get("name", identity.get("kind", "?"))), ", ".join([str(pin)[:16], *settings])


def _add_stub(content: Content, where: str, value: Any) -> None:
    """Note that a stub made `where` if `stub: true` stands anywhere in its manifest or record."""
    if _has_stub(value) and where not in content.stubs:
        content.stubs.append(where)


def _has_stub(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get("stub")) or _has_stub(list(value.values()))
    return isinstance(value, list) and any(map(_has_stub, value))


def _record(content: Content, path: Path, name: str) -> dict[str, Any] | None:
    """A stage's record; adds its run to the cost table."""
    record: dict[str, Any] | None = _read(content, path, _json_object)
    if record is not None:
        content.records[name] = record
        content.runs.append(stage_run(name, record))
        _add_stub(content, name, record)
    return record


def _read(content: Content, path: Path, parse: Callable[[str], Any]) -> Any:
    """The parsed file; None, and listed as missing, if it is missing or damaged."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        content.missing.append(f"{path}: not made yet")
    except (ValueError, TypeError) as error:
        content.missing.append(f"{path} is damaged ({error})")
    return None


def _json_object(text: str) -> dict[str, Any]:
    record = json.loads(text)
    if not isinstance(record, dict):
        raise TypeError("no record")
    return record


def _curve(text: str) -> list[dict[str, float]]:
    return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(text.splitlines())]


def _add_training(content: Content, record: Mapping[str, Any] | None) -> None:
    for key, value in (record or {}).items():
        if key in ("stage", "seconds", "started", "peak_memory_mib", "environment"):
            continue
        if isinstance(value, dict):
            numbers = {name: each for name, each in value.items() if isinstance(each, int | float)}
            value = ", ".join(f"{name} {each:.4g}" for name, each in numbers.items())
        content.training.append((key.replace("_", " "), value))
