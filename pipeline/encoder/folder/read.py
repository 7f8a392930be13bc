"""Read an encoder folder, and check its config, its trained tensors and its backbone."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from pipeline.backbone.loading import BackboneParams, DType, Quantize, identify, load_backbone, load_tokenizer
from pipeline.backbone.lora import WEIGHTS_FILE as ADAPTER_WEIGHTS
from pipeline.backbone.lora import load_adapter
from pipeline.core.config import validate
from pipeline.core.errors import BackboneError, TrainingError
from pipeline.core.files import digest_of, file_sha256
from pipeline.encoder.folder.config import (
    ADAPTER,
    CONFIG_FILE,
    READING_FILE,
    ROTATION_FILE,
    WEIGHTS_FILE,
    EncoderConfig,
)
from pipeline.encoder.folder.tensors import read_reading, read_rotation, read_student
from pipeline.encoder.inference import Encoder

log = logging.getLogger(__name__)

# Files of other model folders, and what such a folder is.
_OTHER_FOLDERS = {
    "run_config.yml": "a checkpoint of the authors' package: python -m pipeline import-official makes an encoder of it",
    "config.json": "a language model or another checkpoint",
    "modules.json": "another model of sentence-transformers",
}
TOKENIZER_CONFIG = "tokenizer_config.json"
_COMMIT = re.compile("[0-9a-f]{40}")
_TRUSTED = "if you trust its code, add --trust-remote-code"
_ELSEWHERE = "say where a copy of it is by --backbone PATH (in Python backbone=PATH)"


def read_encoder(
    path: Path,
    *,
    device: str = "cpu",
    dtype: DType = "float32",
    backbone: Any = None,
    allow_other_backbone: bool = False,
    quantize: Quantize | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """The encoder of a folder, on its backbone.

    Args:
        path: the folder.
        device: of the backbone.
        dtype: of the backbone.
        backbone: a folder, a hub name or a loaded model (not checked) to use instead of the recorded one.
        allow_other_backbone: accept a backbone with other weights, with a warning.
        quantize: see `load_backbone`.
        trust_remote_code: let the backbone run code that comes with it; only the caller can allow it, no folder can.

    Raises:
        TrainingError: the folder is no encoder or damaged, or the backbone is another (see `check_backbone`).
        BackboneError: the backbone cannot be loaded.
    """
    config = read_config(path)
    student, reading, rotation = read_student(path, config), read_reading(path, config), read_rotation(path, config)
    tokenizer = _read_tokenizer(path, trust_remote_code=trust_remote_code)
    other = None
    if backbone is None or isinstance(backbone, str | Path):
        name = config.backbone["name"] if backbone is None else str(backbone)
        other = check_backbone(config, name, allow_other=allow_other_backbone)
        revision = config.backbone.get("revision") if name == config.backbone["name"] else None
        params = BackboneParams(name=name, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
        try:
            backbone = load_backbone(params, device, quantize)
        except BackboneError as error:
            trusted = f"; {_TRUSTED}" if "custom code" in error.message and not trust_remote_code else ""
            raise BackboneError(f"{error}; {_ELSEWHERE}{trusted}") from None
    _check_sizes(config, backbone, tokenizer, other=other is not None)
    adapted = load_adapter(backbone, path / ADAPTER, config.lora) if config.lora else None
    identity = _identity_of(path, config, other)
    student = student.to(backbone.device)
    return Encoder(backbone, tokenizer, student, config, identity, adapted, path, reading, rotation)


def _read_tokenizer(path: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer in an encoder folder; TrainingError if its files are missing or damaged."""
    again = "copy the folder again, or run the train stage"
    # Without its settings transformers loads one that may read texts in another way, and does not say so.
    if not (path / TOKENIZER_CONFIG).is_file():
        raise TrainingError(f"{path} has no {TOKENIZER_CONFIG}: {again}")
    try:
        return load_tokenizer(BackboneParams(name=str(path), trust_remote_code=trust_remote_code))
    except BackboneError as error:
        if "custom code" in error.message:
            raise
        raise TrainingError(f"the tokenizer in {path} cannot be read ({error.message}): {again}") from None


def read_config(path: Path) -> EncoderConfig:
    """The config of an encoder folder.

    Raises:
        TrainingError: the folder holds none.
        ParamsError: a key is missing, unknown or mistyped.
    """
    file = path / CONFIG_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise TrainingError(f"{path} is not an encoder ({_why_not(path)})") from None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{file} is damaged ({error}): run the train stage again") from None
    return validate(content, EncoderConfig, where=str(file))


def _why_not(path: Path) -> str:
    if not path.exists():
        return "there is no such folder: give one that the train stage wrote"
    if not path.is_dir():
        return "it is a file: give the folder that the train stage wrote"
    known = next((what for name, what in _OTHER_FOLDERS.items() if (path / name).exists()), None)
    return f"no {CONFIG_FILE}: {f'it looks like {known}' if known else 'run the train stage first'}"


def _identity_of(path: Path, config: EncoderConfig, other_backbone: dict[str, str] | None) -> dict[str, Any]:
    """What pins the weights of an encoder folder: trained tensors, and what differs from training."""
    trained = file_sha256(path / WEIGHTS_FILE)
    if config.lora is not None:
        trained = digest_of([trained, file_sha256(path / ADAPTER / ADAPTER_WEIGHTS)])
    identity: dict[str, Any] = {"name": path.name, "sha256": trained}
    if config.response_share < 1:
        identity["reading"] = file_sha256(path / READING_FILE)
    if config.rotated_width is not None:
        identity["rotation"] = file_sha256(path / ROTATION_FILE)
    if config.keep != "start":
        identity["keep"] = config.keep
    return identity if other_backbone is None else {**identity, "other_backbone": other_backbone}


def check_backbone(config: EncoderConfig, name: str, *, allow_other: bool = False) -> dict[str, str] | None:
    """Check that the backbone called `name` is the one that the encoder was trained on.

    A local folder is checked by its sha256, wherever it is now; a hub model by name and commit, or by the commit in the
    path of a folder of the hub's cache. Any other folder is used with a warning.

    Returns:
        The identity of another backbone, if `allow_other` (which warns); else None.

    Raises:
        TrainingError: it is another.
        BackboneError: it does not exist.
    """
    recorded = config.backbone
    found = _identity_of_other(recorded, name)
    if found is None:
        return None
    problem = f"backbone {name} has {_pin(found)}, the encoder was trained on {recorded['name']}, {_pin(recorded)}"
    if not allow_other:
        raise TrainingError(
            f"{problem}: its embeddings would mean nothing. Give that backbone by --backbone PATH, train again, or "
            "accept this one by --allow-other-backbone (in Python allow_other_backbone=True)"
        )
    log.warning("%s: embeddings are not those that were trained", problem)
    return found


def _identity_of_other(recorded: dict[str, str], name: str) -> dict[str, str] | None:
    """The identity of the backbone called `name` if it is not the recorded one."""
    same_name, local = name == recorded["name"], Path(name).is_dir()
    if "sha256" in recorded:
        if same_name and not local:
            raise BackboneError(f"the encoder's backbone is the folder {name}, which is not here: {_ELSEWHERE}")
        found = identify(name, None)
        return None if found.get("sha256") == recorded["sha256"] else found
    if not local:
        if same_name and not _COMMIT.fullmatch(recorded.get("revision", "main")):
            log.warning(
                "the encoder's backbone %s is recorded at revision %s, which is no commit: its present weights are "
                "used, whether or not the encoder was trained on them; pin the revision before the next training",
                name,
                recorded.get("revision", "main"),
            )
        return None if same_name else identify(name, None)
    commit = Path(name).resolve().name
    if not all(map(_COMMIT.fullmatch, (commit, recorded.get("revision", "main")))):
        log.warning("%s: cannot be checked against %s, %s", name, recorded["name"], _pin(recorded))
        return None
    return None if commit == recorded["revision"] else {"name": name, "revision": commit}


def _pin(identity: dict[str, str]) -> str:
    sha256 = identity.get("sha256")
    return f"sha256 {sha256[:12]}..." if sha256 else f"revision {identity.get('revision', 'main')}"


def _check_sizes(config: EncoderConfig, backbone: Any, tokenizer: Any, *, other: bool) -> None:
    rows, hidden = backbone.get_input_embeddings().weight.shape
    name = backbone.config.name_or_path or type(backbone).__name__
    if hidden != config.hidden:
        raise TrainingError(
            f"backbone {name} has hidden size {hidden}, the encoder was trained on {config.hidden} "
            f"({config.backbone['name']}): give a backbone of that size"
        )
    # Some models have fewer rows than their own tokenizer tokens, and never use those.
    if other and len(tokenizer) > rows:
        raise TrainingError(
            f"backbone {name} has {rows} token embeddings, the encoder's tokenizer {len(tokenizer)} tokens: give a "
            "backbone with that tokenizer"
        )
