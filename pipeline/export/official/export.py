"""An encoder of ours as a checkpoint of the authors' package: `python -m pipeline export-official MODEL OUT`."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.backbone.loading import BackboneParams, DType, load_tokenizer
from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.artifacts import check_new, create, read_manifest, write_json
from pipeline.core.errors import BackboneError, TrainingError
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.export.merged.folder import old_rope_keys
from pipeline.export.official import format as official
from pipeline.export.official.tokenizer import own_frame, write_tokenizer
from pipeline.export.official.writing import Skeleton, write_adapter, write_backbone, write_projections

BACKBONE = "backbone"

_CARD = """\
# Encoder of {backbone} for the authors' package

Made from an encoder folder of LLM2Vec-Gen Pipeline whose manifest has sha256 `{sha256}`; everything is {dtype}.

```python
from llm2vec_gen import LLM2VecGenModel

model = LLM2VecGenModel.from_pretrained("this folder")
embeddings = model.encode(["Why is the sky blue?"], max_length={max_length})
```

`max_length` counts the {tokens} new tokens{frame}. `run_config.yml` says where the backbone is (`model_name_or_path`).
"""


def export_official(model: Path, out: Path, *, backbone: str | None = None, dtype: DType = "float32") -> list[str]:
    """Write a folder that their package reads and that embeds the same there.

    Args:
        model: an encoder folder.
        out: a new folder.
        backbone: folder or name of the backbone, in place of the recorded one.
        dtype: of all that their package computes; float32 gives the embeddings that the encoder gives in float32.

    Returns:
        What the user should know, a line each.

    Raises:
        ArtifactError: `out` exists.
        TrainingError: `model` is no encoder, the backbone is not the one that it was trained on, or their format has no
            words for it.
        BackboneError: the backbone is missing.
    """
    from safetensors.torch import load_file

    from pipeline.encoder.folder.read import WEIGHTS_FILE, check_backbone, read_config

    check_new(out)
    config = read_config(model)
    name = backbone or config.backbone["name"]
    check_backbone(config, name)
    skeleton = _skeleton(config, name)
    tokenizer = load_tokenizer(BackboneParams(name=str(model)))
    frame = own_frame(tokenizer, config.template, config.chat_template_kwargs)
    student = load_file(model / WEIGHTS_FILE)
    texts = official.token_texts(len(student["tokens"]))
    with create(out, kind="official", params={"dtype": dtype}, models={"backbone": config.backbone}) as writer:
        # Longer than any probe: what is cut is for `max_length` to say.
        formatter = PromptFormatter(tokenizer, config.template, 2**20, config.chat_template_kwargs)
        ids = write_tokenizer(writer.path, tokenizer, texts, formatter, frame)
        write_projections(writer.path, student, dtype)
        write_adapter(writer.path, model, config, skeleton, student["tokens"], ids, dtype)
        copied = write_backbone(writer.path / BACKBONE, Path(name))
        place = (out / BACKBONE if copied else Path(name)).resolve() if Path(name).is_dir() else name
        _write_configs(writer.path, config, skeleton, str(place), texts, ids, dtype)
        card = _card(config, model, dtype, framed=frame is not None)
        (writer.path / "README.md").write_text(card, encoding="utf-8")
    return _remarks(config, name, texts, place=str(place), copied=copied, framed=frame is not None)


def _skeleton(config: EncoderConfig, name: str) -> Skeleton:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        described = AutoConfig.from_pretrained(name, revision=config.backbone.get("revision"))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
    except (OSError, ValueError) as error:
        raise BackboneError(f"cannot read the config of backbone '{name}': {str(error).splitlines()[0]}") from None
    embeddings = model.get_input_embeddings()
    if type(embeddings) is not torch.nn.Embedding:
        raise TrainingError(
            f"{type(embeddings).__name__} of '{name}' scales its rows: their format has no words for that"
        )
    if embeddings.weight.shape[1] != config.hidden:
        raise BackboneError(
            f"backbone {name} has hidden size {embeddings.weight.shape[1]}, the encoder was trained on {config.hidden}"
        )
    (inside,) = [path for path, module in model.base_model.named_modules() if module is embeddings]
    return Skeleton(described, inside, model.base_model_prefix)


def _write_configs(
    folder: Path,
    config: EncoderConfig,
    skeleton: Skeleton,
    backbone: str,
    texts: Sequence[str],
    ids: Sequence[int],
    dtype: DType,
) -> None:
    mode = f"last_{config.compression_tokens}_tokens"
    rope = old_rope_keys(getattr(skeleton.config, "rope_parameters", None) or {})
    described = {**skeleton.config.to_dict(), **rope, "vocab_size": ids[-1] + 1, "num_special_tokens": len(ids)}
    described |= {"special_tokens_ids": list(ids)}
    write_json(folder / official.ENCODER / "config.json", described)
    write_json(folder / official.MODEL_CONFIG, {"encoding_mode": mode, "save_decoder": False})
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
    (folder / official.RUN_CONFIG).write_text("".join(lines), encoding="utf-8")


def _card(config: EncoderConfig, model: Path, dtype: DType, *, framed: bool) -> str:
    tokens = config.compression_tokens + config.thought_tokens
    return _CARD.format(
        backbone=config.backbone["name"],
        sha256=read_manifest(model).digest,
        dtype=dtype,
        max_length=config.max_query_tokens + tokens,
        tokens=tokens,
        frame=" and the template around the text, which the tokenizer adds; texts are expected without white space at "
        "their ends" if framed else "",
    )  # fmt: skip


def _remarks(
    config: EncoderConfig, name: str, texts: Sequence[str], *, place: str, copied: bool, framed: bool
) -> list[str]:
    remarks = []
    length, revision = config.max_query_tokens + len(texts), config.backbone.get("revision", "main")
    if length != official.MAX_LENGTH:
        remarks.append(f"their encode cuts inputs to {official.MAX_LENGTH} tokens: call it with max_length={length}")
    if config.keep == "end":
        remarks.append(
            f"this encoder keeps the end of a text of more than {config.max_query_tokens} tokens, their format has no "
            "words for that: cut such texts before"
        )
    if framed:
        remarks.append(
            "the tokenizer adds the template and the new tokens itself, so their scripts that look for the new tokens "
            "by name find none"
        )
    if copied:
        remarks.append(f"the backbone was copied to {place}, its config written for transformers 4: keep it there")
    elif not Path(name).is_dir() and revision != "main":
        remarks.append(f"their package reads {name} as it is on the hub now, the encoder was trained on {revision}")
    return remarks
