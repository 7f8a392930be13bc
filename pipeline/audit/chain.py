"""What links artifacts: digests of the inputs, and the identities of the models that made them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.artifacts import Artifact, read_manifest
from pipeline.audit.findings import STALE, Findings
from pipeline.backbone import identify
from pipeline.errors import ArtifactError, BackboneError

ROLES = ("backbone", "teacher")
ENCODER_CONFIG = "encoder_config.json"


def check_inputs(root: Path, artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """Each artifact was made from the inputs that are there now."""
    for name, artifact in artifacts.items():
        for path, current in stale_inputs(root, artifact).items():
            digest = artifact.manifest.inputs[path]
            findings.add(
                name, "", f"{STALE}: made from {path} with manifest {digest[:12]}..., now it is {current[:12]}..."
            )


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
            identity = artifact.manifest.models.get(role)
            if identity is None:
                continue
            if first is None:
                first = name, identity
                _check_local(root, name, role, identity, findings)
            elif identity != first[1]:
                findings.add(name, "", f"{role} is {_short(identity)}, in {first[0]} it is {_short(first[1])}")


def check_width(artifacts: Mapping[str, Artifact], findings: Findings) -> None:
    """The encoder states the width that the targets have."""
    targets, encoder = artifacts.get("data/targets"), artifacts.get("models/encoder")
    config = encoder.path / ENCODER_CONFIG if encoder else None
    if targets is None or config is None or not config.is_file():
        return
    stated = json.loads(config.read_text(encoding="utf-8")).get("width")
    kind = pq.read_schema(targets.tables()[0]).field("embedding").type
    if stated != kind.list_size:
        findings.add("models/encoder", ENCODER_CONFIG, f"width is {stated}, the targets have {kind.list_size}")


def _check_local(root: Path, name: str, role: str, identity: Any, findings: Findings) -> None:
    if not isinstance(identity, dict) or "sha256" not in identity:
        return
    folder = root / str(identity["name"])
    if not folder.is_dir():
        findings.add(name, "", f"{role} folder {identity['name']} is not here, its identity cannot be verified")
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
