"""Gathers what the report says from manifests and results. Whatever is missing is listed, nothing is guessed.

The suites and probes come from params, never from the folders: a removed entry leaves files behind.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import Artifact, read_manifest
from pipeline.errors import ArtifactError
from pipeline.report.tables import Comparison, compare

STAGES = ("collect", "generate", "embed", "train")
ARTIFACTS = ("data/queries", "data/responses", "data/targets", "models/encoder")
# These probes read queries as training did, without an instruction, whatever the systems read elsewhere.
UNINSTRUCTED = ("alignment", "interpret")


@dataclass(frozen=True)
class StageRun:
    """One run of a stage: how long, on what, when."""

    name: str
    seconds: float
    peak_memory_mib: int | None
    started: str
    machine: str
    versions: str
    git_revision: str


@dataclass(frozen=True)
class Sample:
    """What one held-out query's embedding holds."""

    query: str
    response: str
    decoded: str
    faithfulness: float | None
    vocabulary: list[str]


@dataclass
class Content:
    """Everything that the templates print."""

    title: str
    stubs: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    models: list[tuple[str, str, str]] = field(default_factory=list)
    data: list[tuple[str, int, str]] = field(default_factory=list)
    runs: list[StageRun] = field(default_factory=list)
    training: list[tuple[str, Any]] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    heldout: list[dict[str, float]] = field(default_factory=list)
    alignment: Comparison | None = None
    suites: list[Comparison] = field(default_factory=list)
    probes: list[Comparison] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def gather(title: str, suites: Iterable[str], probes: Iterable[str], root: Path = Path()) -> Content:
    """The content of the report on the workspace `root`."""
    content = Content(title)
    for name in ARTIFACTS:
        _add_artifact(content, root, name)
    records = {stage: _record(content, root / "results" / f"{stage}.json", stage) for stage in STAGES}
    _add_training(content, records["train"])
    content.curve = _curve(content, root / "results/train/loss.csv")
    content.heldout = _curve(content, root / "results/train/heldout.csv")
    for suite in suites:
        if record := _record(content, root / "results/evaluate" / f"{suite}.json", f"evaluate {suite}"):
            content.suites.append(compare(suite, record))
    for probe in probes:
        if record := _record(content, root / "results/probe" / f"{probe}.json", f"probe {probe}"):
            _add_probe(content, root, probe, record)
    return content


def _add_artifact(content: Content, root: Path, name: str) -> None:
    try:
        artifact = read_manifest(root / name)
    except ArtifactError as error:
        content.missing.append(str(error))
        return
    manifest = artifact.manifest
    content.data.append((name, manifest.rows, _counts(manifest.counts)))
    for role, identity in manifest.models.items():
        if role not in {known for known, _, _ in content.models}:
            content.models.append((role, *_named(identity)))
    if stub := _stub({"params": manifest.params, "models": manifest.models}):
        _add_stub(content, name, stub)


def _counts(counts: Mapping[str, Any]) -> str:
    """Counts as text; the nested ones (per source) only by their total."""
    flat = counts.get("all", counts)
    return ", ".join(f"{key} {value:,}" for key, value in flat.items() if isinstance(value, int) and value)


def _named(identity: Any) -> tuple[str, str]:
    """A model's name and what pins it."""
    if not isinstance(identity, dict):
        return str(identity), ""
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
    content.runs.append(_stage_run(name, record))
    _add_stub(content, name, _stub(record))
    return record


def _stage_run(name: str, record: Mapping[str, Any]) -> StageRun:
    environment = record.get("environment", {})
    versions = environment.get("versions", {})
    gpus = environment.get("gpus") or []
    machine = ", ".join(gpus) or f"{environment.get('cores', '?')} cores, {environment.get('memory_gib', '?')} GiB"
    return StageRun(
        name=name,
        seconds=float(record.get("seconds", 0.0)),
        peak_memory_mib=record.get("peak_memory_mib"),
        started=str(record.get("started", "")),
        machine=machine,
        versions=", ".join(f"{library} {version}" for library, version in versions.items()),
        git_revision=str(environment.get("git_revision") or ""),
    )


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


def _add_probe(content: Content, root: Path, name: str, record: Mapping[str, Any]) -> None:
    comparison = compare(name, record)
    if name in UNINSTRUCTED:
        comparison = replace(comparison, prompting={})
    if name == "alignment":
        content.alignment = comparison
        return
    content.probes.append(comparison)
    if name == "interpret":
        content.samples = _samples(content, root / "results/probe/interpret")


def _samples(content: Content, folder: Path) -> list[Sample]:
    try:
        rows = _tables(read_manifest(folder)).to_pylist()
    except (ArtifactError, pa.ArrowInvalid, OSError) as error:
        content.missing.append(f"{folder}: {error}")
        return []
    return [
        Sample(
            query=row.get("query") or "",
            response=row.get("response") or "",
            decoded=row.get("decoded") or "",
            faithfulness=row.get("faithfulness"),
            vocabulary=_words(row.get("vocabulary") or []),
        )
        for row in rows
    ]


def _tables(artifact: Artifact) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in artifact.tables()])


def _words(per_token: Sequence[Sequence[str]]) -> list[str]:
    """The words nearest to any token, each once, in the order of their first appearance by rank."""
    deepest = max((len(words) for words in per_token), default=0)
    ranked = (words[rank].strip() for rank in range(deepest) for words in per_token if rank < len(words))
    return list(dict.fromkeys(word for word in ranked if word))[:16]
