"""Another response share for a trained encoder, without training: `python -m pipeline mix MODEL --response-share A`.

A share is a number of the config, so the folder is copied with that number changed, and is the one that training with
it would have written. A rotation belongs to the embeddings of one share, so it is left behind.
"""

import copy
from pathlib import Path

from pipeline.core.errors import TrainingError
from pipeline.core.target_transform import load_transform
from pipeline.encoder.folder.config import (
    READING_FILE,
    EncoderConfig,
    ResponseForm,
    check_decorrelated,
    check_form,
)
from pipeline.encoder.folder.derive import derive, open_source
from pipeline.encoder.folder.read import read_config
from pipeline.encoder.folder.tensors import read_reading


def mix(model: Path, response_share: float, out: Path, form: ResponseForm | None = None) -> EncoderConfig:
    """Write the encoder folder `model` with another response share as `out`, which may be `model`; returns its config.

    `form` None keeps that of the encoder.

    Raises:
        TrainingError: the share is not in (0, 1], the encoder has no reading, or it cannot be added.
        ArtifactError: `model` is missing or damaged, or `out` exists.
    """
    if not 0 < response_share <= 1:
        raise TrainingError(f"{response_share}: it must be above 0 and at most 1", argument="response_share")
    source = open_source(model, out)
    if READING_FILE not in source.manifest.files and response_share < 1:
        raise TrainingError(
            f"{model} has no {READING_FILE} (an imported encoder, or one of an older version): nothing can stand "
            "beside its predicted response; train again"
        )
    before = read_config(model)
    mixed = {"response_share": response_share, "response_form": form or before.response_form}
    reading = read_reading(model, before)
    mapped = reading is not None and reading.to_targets is not None
    _check_form(source.path, before, form or before.response_form, mapped=mapped)
    config = before.model_copy(update={**mixed, "rotated_width": None})
    params = copy.deepcopy(source.manifest.params)
    train = params.setdefault("train", {})
    train.update(mixed)
    if train["response_form"] == "beside" and "decorrelate_reading" in train:
        # Encoders of older versions are decorrelated in the form added alone.
        train["decorrelate_reading"] = before.decorrelate_reading
    params.pop("rotate", None)
    derive(source, out, config, params)
    return config


def _check_form(folder: Path, config: EncoderConfig, form: ResponseForm, *, mapped: bool) -> None:
    """Raises TrainingError unless prediction and reading of an encoder can be joined in a form."""
    if not config.decorrelate_reading:
        check_form(form, config.teacher, config.transform, mapped=mapped)
        return
    transform = load_transform(folder)
    decorrelated = transform is not None and not transform.diagonal
    check_decorrelated(form, config.teacher, config.transform, decorrelated=decorrelated, mapped=False)
