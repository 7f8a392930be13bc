"""An encoder of ours as a checkpoint of the authors' package: `python -m pipeline export-official MODEL OUT`."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.backbone.loading import BackboneParams, DType, load_tokenizer
from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.artifacts import check_new, create, read_manifest
from pipeline.core.errors import BackboneError, TrainingError, describe
from pipeline.core.files import write_json
from pipeline.core.text import templates
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.export.merged.folder import old_rope_keys
from pipeline.export.merged.tokenizer import UNBOUNDED
from pipeline.export.official import files
from pipeline.export.official.tokenizer import own_frame, write_tokenizer
from pipeline.export.official.writing import BackboneStructure, write_adapter, write_backbone, write_projections

BACKBONE = "backbone"


def export_official(model: Path, out: Path, *, backbone: str | None = None, dtype: DType = "float32") -> list[str]:
    """Write a folder that embeds in their package as the encoder does; returns notes for the user.

    Args:
        backbone: folder or name of the backbone, in place of the recorded one.
        dtype: that their package computes in; float32 gives the encoder's own embeddings in float32.

    Raises:
        ArtifactError: `out` exists.
        TrainingError: `model` is no encoder, was trained on another backbone, or their format cannot express it.
        BackboneError: the backbone is missing.
    """
    from pipeline.encoder.folder.read import check_backbone, read_config
    from pipeline.encoder.folder.tensors import read_reading, read_rotation, read_student
    from pipeline.encoder.head import EmbeddingHead

    check_new(out)
    config = read_config(model)
    name = backbone or config.backbone["name"]
    check_backbone(config, name)
    structure = _structure(config, name)
    tokenizer = load_tokenizer(BackboneParams(name=str(model)))
    frame = own_frame(tokenizer, config.template, config.chat_template_kwargs)
    student = read_student(model, config)
    parts = read_reading(model, config), read_rotation(model, config)
    decorrelated = config.decorrelate_reading
    head = EmbeddingHead(student, config.response_share, *parts, config.response_form, decorrelated=decorrelated)
    texts = files.token_texts(len(student.tokens))
    with create(out, kind="official", params={"dtype": dtype}, models={"backbone": config.backbone}) as writer:
        # Nothing is truncated here: `max_length` does it.
        formatter = PromptFormatter(tokenizer, config.template, UNBOUNDED, config.chat_template_kwargs)
        ids = write_tokenizer(writer.path, tokenizer, texts, formatter, frame)
        write_projections(writer.path, head, dtype)
        write_adapter(writer.path, model, config, structure, student.tokens.detach(), ids, dtype)
        copied = write_backbone(writer.path / BACKBONE, Path(name))
        location = (out / BACKBONE if copied else Path(name)).resolve() if Path(name).is_dir() else name
        _write_configs(writer.path, config, structure, str(location), texts, ids, dtype)
        card = _card(config, model, dtype, framed=frame is not None)
        (writer.path / "README.md").write_text(card, encoding="utf-8")
    return _notes(config, name, texts, location=str(location), copied=copied, framed=frame is not None)


def _structure(config: EncoderConfig, name: str) -> BackboneStructure:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        described = AutoConfig.from_pretrained(name, revision=config.backbone.get("revision"), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
    except (OSError, ValueError) as error:
        if "custom code" in str(error):
            raise TrainingError(f"'{name}' brings its own code, which their package does not run") from None
        raise BackboneError(f"cannot read the config of backbone '{name}': {describe(error)}") from None
    embeddings = model.get_input_embeddings()
    if type(embeddings) is not torch.nn.Embedding:
        kind = type(embeddings).__name__
        raise TrainingError(f"{kind} of '{name}' scales its rows, which their format cannot express")
    if (size := embeddings.weight.shape[1]) != config.hidden:
        raise BackboneError(f"backbone {name} has hidden size {size}, the encoder was trained on {config.hidden}")
    (inside,) = [path for path, module in model.base_model.named_modules() if module is embeddings]
    return BackboneStructure(described, inside, model.base_model_prefix)


def _write_configs(
    folder: Path,
    config: EncoderConfig,
    structure: BackboneStructure,
    backbone: str,
    texts: Sequence[str],
    ids: Sequence[int],
    dtype: DType,
) -> None:
    mode = f"last_{config.compression_tokens}_tokens"
    rope = old_rope_keys(getattr(structure.config, "rope_parameters", None) or {})
    described = {**structure.config.to_dict(), **rope, "vocab_size": ids[-1] + 1, "num_special_tokens": len(ids)}
    described |= {"special_tokens_ids": list(ids)}
    write_json(folder / files.ENCODER / "config.json", described)
    write_json(folder / files.MODEL_CONFIG, {"encoding_mode": mode, "save_decoder": False})
    run = {
        "model_name_or_path": backbone,
        "model_revision": config.backbone.get("revision", "main"),
        "torch_dtype": dtype,
        "special_tokens": list(texts),
        "encoding_mode": mode,
        "max_input_length": config.max_query_tokens + len(ids),
        "tokenizer_padding_side": "left",
        "add_reconstruction_mlp": True,
        "add_alignment_mlp": True,
    }
    # Values in JSON are values in YAML.
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in run.items()]
    (folder / files.RUN_CONFIG).write_text("".join(lines), encoding="utf-8")


def _card(config: EncoderConfig, model: Path, dtype: DType, *, framed: bool) -> str:
    template = templates(Path(__file__).parent, autoescape=False).get_template("exported.md.j2")
    return template.render(config=config, sha256=read_manifest(model).digest, dtype=dtype, framed=framed)


def _notes(
    config: EncoderConfig, name: str, texts: Sequence[str], *, location: str, copied: bool, framed: bool
) -> list[str]:
    length, revision = config.max_query_tokens + len(texts), config.backbone.get("revision", "main")
    on_hub = not copied and not Path(name).is_dir()
    notes = {
        f"their encode cuts inputs to {files.MAX_LENGTH} tokens: call it with max_length={length}": (
            length != files.MAX_LENGTH
        ),
        f"this encoder keeps the end of a text of more than {config.max_query_tokens} tokens, which their format "
        "cannot express: cut such texts before": config.keep == "end",
        "the tokenizer adds the template and the new tokens itself, so scripts of theirs that look for the new tokens "
        "by name find none": framed,
        "the reading beside the predicted response, or the rotation, goes through the inverse of the reconstruction "
        "projection": config.response_share < 1 or config.rotated_width is not None,
        f"the backbone was copied to {location}, its config written for transformers 4: keep it there": copied,
        f"their package reads the current {name} on the hub, the encoder was trained on {revision}": (
            on_hub and revision != "main"
        ),
    }
    return [note for note, applies in notes.items() if applies]
