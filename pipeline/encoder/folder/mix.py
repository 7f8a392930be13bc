"""Another response share for a trained encoder, without training: `python -m pipeline mix MODEL --response-share A`.

A share is a number of the config, so the folder is copied with that number changed, and is the one that training with
it would have written.
"""

import copy
import shutil
from pathlib import Path

from pipeline.core.artifacts import Artifact, check_new, create, open_artifact, write_json
from pipeline.core.errors import TrainingError
from pipeline.encoder.folder.card import CARD_FILE, with_share
from pipeline.encoder.folder.config import CONFIG_FILE, READING_FILE, EncoderConfig
from pipeline.encoder.folder.read import read_config


def mix(model: Path, response_share: float, out: Path) -> EncoderConfig:
    """Write the encoder folder `model` with another response share as `out`, which may be `model`; returns its config.

    Raises:
        TrainingError: the share is not in (0, 1], or the encoder has no reading.
        ArtifactError: `model` is missing or damaged, or `out` exists.
    """
    if not 0 < response_share <= 1:
        raise TrainingError(f"{response_share}: it must be above 0 and at most 1", argument="response_share")
    artifact = open_artifact(model, "encoder")
    if out.resolve() != model.resolve():
        check_new(out)
    before = read_config(model)
    if READING_FILE not in artifact.manifest.files and response_share < 1:
        raise TrainingError(
            f"{model} has no {READING_FILE} (an imported encoder, or one of an older version): nothing can stand "
            "beside its predicted response; train again"
        )
    after = before.model_copy(update={"response_share": response_share})
    manifest = artifact.manifest
    params = copy.deepcopy(manifest.params)
    params.setdefault("train", {})["response_share"] = response_share
    inputs = [Artifact(Path(path), manifest, digest) for path, digest in manifest.inputs.items()]
    with create(out, kind="encoder", params=params, models=manifest.models, inputs=inputs) as writer:
        for name in manifest.files:
            (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / name, writer.path / name)
        write_json(writer.path / CONFIG_FILE, after.model_dump())
        card = writer.path / CARD_FILE
        card.write_text(with_share(card.read_text(encoding="utf-8"), before, after), encoding="utf-8")
    return after
