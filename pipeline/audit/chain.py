"""What links artifacts: digests of the inputs, and the identities of the models that made them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.audit.findings import ENCODER, STALE, TARGETS, TEACHER, Findings
from pipeline.backbone.loading import identify
from pipeline.core.artifacts import Artifact, read_manifest
from pipeline.core.errors import ArtifactError, BackboneError
from pipeline.core.sources import changed
from pipeline.core.target_transform import TRANSFORM_FILE, load_transform

ROLES = ("backbone", "teacher")
ENCODER_CONFIG, READING_FILE = "encoder_config.json", "reading.safetensors"


def check_inputs(root: Path, artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """Each artifact was made from the inputs that are there now."""
    for name, artifact in artifacts.items():
        for path, current in stale_inputs(root, artifact).items():
            digest = artifact.manifest.inputs[path]
            findings.add(
                name, "", f"{STALE}: made from {path} with manifest {digest[:12]}..., now it is {current[:12]}..."
            )


def check_sources(root: Path, artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """Each artifact was made from the sources as they are now, where they can be read."""
    for name, artifact in artifacts.items():
        recorded = artifact.manifest.sources
        differing, absent = changed(recorded, root)
        for path, found in differing.items():
            digests = f"with sha256 {recorded[path][:12]}..., now it is {found[:12]}..."
            findings.add(name, path, f"{STALE}: made from this source {digests}")
        for path in absent:
            findings.cannot_verify(name, path, "this source is not here")


def stale_inputs(root: Path, artifact: Artifact) -> dict[str, str]:
    """The inputs that were made anew since, with the digests of their manifests as they are now."""
    found = {}
    for path, digest in artifact.manifest.inputs.items():
        try:
            current = read_manifest(root / path).digest
        except ArtifactError:
            continue  # reported for the input itself
        if current != digest:
            found[path] = current
    return found


def check_models(root: Path, artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """Each role is filled by the same model in every artifact, and a local model's files are unchanged."""
    for role in ROLES:
        first: tuple[str, Any] | None = None
        for name, artifact in artifacts.items():
            identity, _ = _apart(artifact.manifest.models.get(role))
            if identity is None:
                continue
            if first is None:
                first = name, identity
                _check_local(root, name, role, identity, findings)
            elif identity != first[1]:
                findings.add(name, "", f"{role} is {_short(identity)}, in {first[0]} it is {_short(first[1])}")


def check_trained_teacher(root: Path, artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """Targets whose teacher was trained here were made by the adapters that are there now."""
    targets = artifacts.get(TARGETS)
    teacher = (targets.manifest.models.get("teacher") or {}) if targets else {}
    for adapter in teacher.get("adapters", []):
        if not str(adapter["name"]).startswith(f"{TEACHER}/"):
            continue
        try:
            found = identify(str(root / adapter["name"]), None).get("sha256")
        except BackboneError:
            found = None
        if found != adapter.get("sha256"):
            what = f"its sha256 is {found[:12]}..." if found else "it is missing"
            findings.add(TARGETS, "", f"was made by another {adapter['name']} than is there now: {what}")


def check_width(artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """The encoder states the width that the targets have."""
    targets, encoder = artifacts.get(TARGETS), artifacts.get(ENCODER)
    config, tables = _encoder_config(encoder), targets.tables() if targets else []
    found = pq.read_schema(tables[0]) if tables else pa.schema([])
    kind = found.field("embedding").type if "embedding" in found.names else None
    if config is None or not isinstance(kind, pa.FixedSizeListType):
        return  # reported for the config and for the targets themselves
    stated = config.get("width")
    if stated != kind.list_size:
        findings.add(ENCODER, ENCODER_CONFIG, f"width is {stated}, the targets have {kind.list_size}")


def check_share(artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """The encoder's config has the response share of its params, and below 1 a reading."""
    encoder = artifacts.get(ENCODER)
    if encoder is None or ENCODER_CONFIG not in encoder.manifest.files:
        return
    found, params = _encoder_config(encoder), encoder.manifest.params.get("train") or {}
    if found is None:
        findings.add(ENCODER, ENCODER_CONFIG, "holds no mapping in JSON: run train again")
        return
    stated = found.get("response_share", 1.0)
    # Encoders of older versions do not state the last one.
    stated_reading = found.get("decorrelate_reading", params.get("decorrelate_reading", False))
    for name, usual in (("response_share", 1.0), ("response_form", "beside"), ("decorrelate_reading", stated_reading)):
        here, wanted = found.get(name, usual), params.get(name, usual)
        if here != wanted:
            findings.add(ENCODER, ENCODER_CONFIG, f"{name} is {here}, the params of the manifest say {wanted}")
    if stated < 1 and READING_FILE not in encoder.manifest.files:
        findings.add(ENCODER, READING_FILE, f"is missing, which response_share {stated} needs")


def _encoder_config(encoder: Artifact | None) -> dict[str, Any] | None:
    """The encoder's config; None if there is none, or it holds something else."""
    if encoder is None or ENCODER_CONFIG not in encoder.manifest.files:
        return None
    try:
        found = json.loads((encoder.path / ENCODER_CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def check_transform(artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """Targets that were transformed say by what; the encoder carries the same, and so did the teacher when measured."""
    targets, encoder = artifacts.get(TARGETS), artifacts.get(ENCODER)
    if targets is None:
        return
    kind = (targets.manifest.params.get("transform") or {}).get("kind", "none")
    wanted = targets.manifest.files.get(TRANSFORM_FILE)
    if kind != "auto" and (kind != "none") != (wanted is not None):
        findings.add(TARGETS, TRANSFORM_FILE, f"is {'here' if wanted else 'not here'}, the transform is {kind}")
    if encoder is not None and encoder.manifest.files.get(TRANSFORM_FILE) != wanted:
        findings.add(ENCODER, TRANSFORM_FILE, f"is not that of {TARGETS}: run train again")
    found = load_transform(targets.path) if wanted else None
    made = found.identity if found else None
    for name, artifact in artifacts.items():
        _, measured = _apart(artifact.manifest.models.get("teacher"))
        if name.startswith("results/") and "teacher" in artifact.manifest.models and measured != made:
            what = f"measured the teacher behind {_short_transform(measured)}, {TARGETS} were made behind"
            findings.add(name, "", f"{what} {_short_transform(made)}: run it again")


def _apart(identity: Any) -> tuple[Any, Any]:
    """A model's identity without its transform, which `check_transform` compares, and the transform's."""
    if not isinstance(identity, dict):
        return identity, None
    return {key: value for key, value in identity.items() if key != "transform"}, identity.get("transform")


def _short_transform(identity: Any) -> str:
    return f"{identity['kind']} ({identity['sha256'][:12]})" if identity else "no transform"


def _check_local(root: Path, name: str, role: str, identity: Any, findings: Findings) -> None:
    if not isinstance(identity, dict) or "sha256" not in identity:
        return
    folder = root / str(identity["name"])
    if not folder.is_dir():
        findings.cannot_verify(name, "", f"{role} folder {identity['name']} is not here")
        return
    try:
        found = identify(str(folder), None).get("sha256", "")
    except BackboneError as error:
        findings.add(name, "", f"{role}: {error}")
        return
    if found != identity["sha256"]:
        what = f"{role} folder {identity['name']} has changed: sha256 is {found[:12]}..., the manifest says"
        findings.add(name, "", f"{what} {identity['sha256'][:12]}...")


def _short(identity: Any) -> str:
    if not isinstance(identity, dict):
        return str(identity)
    pin = identity.get("revision") or identity.get("sha256") or "unpinned"
    return f"{identity.get('name')} ({str(pin)[:12]})"
