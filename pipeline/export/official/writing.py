"""The tensor files of a checkpoint of the authors: projections, adapter, and the backbone if it must be copied."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.backbone.loading import DType
from pipeline.core.errors import TrainingError
from pipeline.core.files import write_json
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.export.merged.folder import old_rope_keys
from pipeline.export.official import files

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.encoder.head import EmbeddingHead

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


class BackboneStructure(NamedTuple):
    """A backbone's config, the names of its embeddings within the transformer and of that within the model."""

    config: Any
    embeddings: str
    body: str


# Largest relative error of the reading, in float32, after the reconstruction projection and back.
LIMIT = 1e-4


def write_projections(folder: Path, head: "EmbeddingHead", dtype: DType) -> None:
    """Write the two linear layers; raises TrainingError if the second cannot hold the reading."""
    import torch

    kind, first = getattr(torch, dtype), head.student.reconstruction
    layers = {files.RECONSTRUCTION: (first.weight.detach(), first.bias.detach()), files.ALIGNMENT: alignment(head)}
    for file, (weight, bias) in layers.items():
        weight, bias = weight.to(kind), bias.to(kind)
        config = {
            "input_dim": weight.shape[1],
            "output_dim": weight.shape[0],
            "dtype": f"torch.{dtype}",
            "size": 1,
            "pooling_mode": "linear",
        }
        torch.save(
            {"state_dict": {"projection.weight": weight, "projection.bias": bias}, "config": config}, folder / file
        )


def alignment(head: "EmbeddingHead") -> "tuple[Tensor, Tensor]":
    """Weight `[width, d]` and bias `[width]` of the map from soft prompts to embeddings, float32.

    The reading is affine in the hidden states, which the inverse of the reconstruction projection gives back. Raises
    TrainingError if that inverse is too inexact.
    """
    import torch

    student = head.student
    if head.share == 1 and head.rotation is None:
        return student.alignment.weight.detach(), student.alignment.bias.detach()
    with torch.no_grad():
        first = student.reconstruction.weight.double()
        wanted, bias = head.composed()
        try:
            weight = torch.linalg.solve(first, wanted, left=False)
        except RuntimeError:  # it is singular
            weight = torch.full_like(wanted, torch.nan)
        error = float((weight.float().double() @ first - wanted).norm() / wanted.norm())
        if not error <= LIMIT:
            raise TrainingError(
                f"response_share is {head.share}, {'un' * (head.rotation is None)}rotated, and their format has that "
                f"only behind the inverse of the reconstruction projection, which is off by {error:.2g} here (limit "
                f"{LIMIT}): export an encoder that `python -m pipeline mix --response-share 1` made"
            )
        return weight.float(), (bias - weight @ student.reconstruction.bias.double()).float()


def write_adapter(
    folder: Path,
    model: Path,
    config: EncoderConfig,
    backbone: BackboneStructure,
    rows: "Tensor",
    ids: Sequence[int],
    dtype: DType,
) -> None:
    """Write the adapter of the encoder folder `model`: rows `[N, d]` of the new tokens `ids`, and LoRA if it has it.

    Raises TrainingError if LoRA adapts something outside the transformer.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from pipeline.backbone.lora import WEIGHTS_FILE
    from pipeline.encoder.folder.config import ADAPTER

    name = f"{files.PREFIX}{backbone.embeddings}"
    content: dict[str, Any] = {"base_model_name_or_path": config.backbone["name"], "inference_mode": True}
    tensors = {}
    if config.lora is None:
        name = f"{name}.{files.ROWS}"
        content |= {
            "peft_type": "TRAINABLE_TOKENS",
            "target_modules": [backbone.embeddings],
            "token_indices": list(ids),
            "init_weights": True,
        }
    else:
        name = f"{name}.token_adapter.{files.ROWS}"
        tensors = _without_body(load_file(model / ADAPTER / WEIGHTS_FILE), backbone.body)
        content |= {
            "peft_type": "LORA",
            "r": config.lora.rank,
            "lora_alpha": config.lora.alpha,
            "lora_dropout": config.lora.dropout,
            "bias": "none",
            "target_modules": _targets(config.lora.targets, tensors),
            "trainable_token_indices": {backbone.embeddings: list(ids)},
        }
    (folder / files.ENCODER).mkdir()
    write_json(folder / files.ADAPTER_CONFIG, content)
    tensors |= {name: rows.to(getattr(torch, dtype)).contiguous()}
    save_file(tensors, folder / files.ADAPTER_WEIGHTS, {"format": "pt"})


def _without_body(tensors: "Mapping[str, Tensor]", body: str) -> "dict[str, Tensor]":
    """Adapters of the whole language model under their names in its transformer."""
    prefix = f"{files.PREFIX}{body}."
    outside = [name for name in tensors if not name.startswith(prefix)]
    if outside:
        raise TrainingError(f"adapter {outside[0]} lies outside the transformer: their package adapts nothing else")
    return {files.PREFIX + name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _targets(targets: list[str] | str, tensors: "Mapping[str, Tensor]") -> list[str]:
    if isinstance(targets, list):
        return targets
    return sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})


def write_backbone(folder: Path, local: Path) -> bool:
    """Copy a local backbone if version 4 of transformers would misread its config; returns whether it did."""
    if not local.is_dir():
        return False
    content = json.loads((local / "config.json").read_text(encoding="utf-8"))
    old = old_rope_keys(content.get("rope_parameters") or {})
    if all(content.get(key) == value for key, value in old.items()):
        return False
    folder.mkdir()
    write_json(folder / "config.json", content | old)
    for file in sorted({file for pattern in _WEIGHTS for file in local.glob(pattern)}):
        shutil.copyfile(file, folder / file.name)
    return True
