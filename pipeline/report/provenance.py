"""The params that made each artifact, and the params file, as text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.artifacts import read_manifest
from pipeline.errors import ArtifactError


@dataclass(frozen=True)
class Provenance:
    """What an artifact's manifest says of its making: its own digest, its inputs' and its params as YAML."""

    artifact: str
    digest: str
    inputs: Mapping[str, str]
    params: str


def provenance(root: Path, artifacts: Iterable[str]) -> list[Provenance]:
    """Of each artifact that is there and readable."""
    found = []
    for name in artifacts:
        try:
            artifact = read_manifest(root / name)
        except ArtifactError:
            continue  # said elsewhere
        manifest = artifact.manifest
        made_by = {"params": manifest.params} | ({"models": manifest.models} if manifest.models else {})
        found.append(Provenance(name, artifact.digest, manifest.inputs, to_yaml(made_by)))
    return found


def to_yaml(value: Any) -> str:
    """Block-style YAML in the order of the keys."""
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 100
    sink = StringIO()
    yaml.dump(value, sink)
    return sink.getvalue()
