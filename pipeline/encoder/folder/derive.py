"""An encoder folder made of another one without training: the same files, with another config."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.artifacts import Artifact, check_new, create, open_artifact
from pipeline.core.errors import ArtifactError
from pipeline.core.files import write_json
from pipeline.encoder.folder.card import CARD_FILE, with_config
from pipeline.encoder.folder.config import CONFIG_FILE, ROTATION_FILE, EncoderConfig
from pipeline.encoder.folder.read import read_config
from pipeline.encoder.folder.tensors import write_tensors
from pipeline.encoder.head import Rotation


def open_source(model: Path, out: Path) -> Artifact:
    """The encoder folder `model`, verified; raises ArtifactError if it is damaged, or another folder `out` exists."""
    artifact = open_artifact(model, "encoder")
    if out.resolve() != model.resolve():
        check_new(out)
        if model.resolve() in out.resolve().parents:
            raise ArtifactError(f"{out} lies in {model}, which would be damaged by it: name a folder beside it")
    return artifact


def derive(
    source: Artifact, out: Path, config: EncoderConfig, params: Mapping[str, Any], rotation: Rotation | None = None
) -> None:
    """Write `source` with another config, params of the manifest and rotation as `out`, which may be `source`."""
    before, manifest = read_config(source.path), source.manifest
    inputs = [Artifact(Path(path), manifest, digest) for path, digest in manifest.inputs.items()]
    with create(out, kind="encoder", params=params, models=manifest.models, inputs=inputs) as writer:
        for name in manifest.files.keys() - {ROTATION_FILE}:
            (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, writer.path / name)
        if rotation is not None:
            write_tensors(writer.path / ROTATION_FILE, rotation.tensors())
        write_json(writer.path / CONFIG_FILE, config.model_dump())
        card = writer.path / CARD_FILE
        card.write_text(with_config(card.read_text(encoding="utf-8"), before, config), encoding="utf-8")
