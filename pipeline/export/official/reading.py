"""A checkpoint of the authors as checked tensors and plain values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backbone.lora import LoraParams
from pipeline.core.config import validate
from pipeline.core.errors import ArtifactError
from pipeline.export.official import files
from pipeline.export.official.files import RunConfig, adapter_tensors, named_tensors, read_json, unpickle

if TYPE_CHECKING:
    from torch import Tensor

# Options of peft's LoRA beyond adding alpha / rank * B @ A.
_OTHER_LORA = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "alora_invocation_tokens")


@dataclass(frozen=True)
class Linear:
    """A linear layer: weight `[out, in]`, bias `[out]`, as stored."""

    weight: "Tensor"
    bias: "Tensor"


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The content of a checkpoint.

    Attributes:
        texts, ids: of the N new tokens, in the order in which they are appended.
        rows: `[N, d]`, input embeddings of the new tokens, in the same order.
        compression_tokens: number of new tokens, from the end, that are read out.
        reconstruction: None if the hidden states are the soft prompts.
        alignment: None if the mean soft prompt is the embedding.
        adapter: tensors of the adapters under peft's names for a transformer without its head.
        table: `[V, d]`, the backbone's input embeddings if the checkpoint has them.
        teacher: names of the teacher and of its second adapter.
        max_length: input tokens in training, new ones included.
        own_decoder: whether the decoder was trained too; it is not read.
    """

    backbone: str
    texts: list[str]
    ids: list[int]
    rows: "Tensor"
    compression_tokens: int
    reconstruction: Linear | None
    alignment: Linear | None
    lora: LoraParams | None
    adapter: "dict[str, Tensor]"
    table: "Tensor | None"
    teacher: list[str]
    max_length: int
    own_decoder: bool
    pads_left: bool


def read_checkpoint(folder: Path) -> OfficialCheckpoint:
    """Read and check a checkpoint. Its pickles may hold tensors and plain values only.

    Raises:
        ArtifactError: it has another format, a file is missing, damaged or unsafe, or our format cannot express it.
        ParamsError: the rank of its adapter is missing or impossible.
    """
    run = RunConfig(folder)
    model = read_json(folder / files.MODEL_CONFIG) if (folder / files.MODEL_CONFIG).is_file() else {}
    adapter, tensors = read_json(folder / files.ADAPTER_CONFIG), adapter_tensors(folder)
    texts = run.texts("special_tokens")
    ids = _token_ids(folder, texts)
    mode = str(model.get("encoding_mode", run.text("encoding_mode", "last_10_tokens")))
    length = run.text("max_input_length")
    return OfficialCheckpoint(
        backbone=run.text("model_name_or_path"),
        texts=texts,
        ids=ids,
        rows=_rows(tensors, adapter, ids, folder),
        compression_tokens=_compression_tokens(mode, len(texts), folder),
        reconstruction=_projection(folder, files.RECONSTRUCTION, run),
        alignment=_projection(folder, files.ALIGNMENT, run),
        lora=_lora(adapter, tensors, folder),
        adapter={name: tensor for name, tensor in tensors.items() if ".lora_" in name},
        table=next((tensor for name, tensor in tensors.items() if name.endswith("base_layer.weight")), None),
        teacher=[name for end in ("", "_2") if (name := run.text(f"pretrained_teacher_path{end}"))],
        max_length=int(length) if length.isdecimal() else files.MAX_LENGTH,
        own_decoder=bool(model.get("save_decoder")),
        pads_left=read_json(folder / files.TOKENIZER_CONFIG).get("padding_side") == "left",
    )


def _compression_tokens(mode: str, tokens: int, folder: Path) -> int:
    found = re.fullmatch(r"last_(\d+)_tokens", mode)
    if found is None or not 1 <= int(found[1]) <= tokens:
        raise ArtifactError(f"{folder}: encoding_mode is '{mode}', known are last_1_tokens to last_{tokens}_tokens")
    return int(found[1])


def _token_ids(folder: Path, texts: list[str]) -> list[int]:
    """Ids of the new tokens in the order of their texts, which must be those that `encode` appends."""
    described = read_json(folder / files.TOKENIZER_CONFIG)
    listed = described.get("additional_special_tokens") or described.get("extra_special_tokens") or []
    appended = [token.get("content") if isinstance(token, dict) else token for token in listed]
    if not appended:
        raise ArtifactError(
            f"{folder / files.TOKENIZER_CONFIG} names no new tokens for their encode to append, as export-official "
            "writes it for an encoder with a chat template: use the encoder that it was made from"
        )
    if appended != texts:
        lists = f"{files.RUN_CONFIG} lists {', '.join(texts)} as the new tokens"
        raise ArtifactError(f"{folder}: its {lists}, its tokenizer appends {', '.join(map(str, appended))}")
    tokens = read_json(folder / files.TOKENIZER).get("added_tokens", [])
    added = {token.get("content"): token.get("id") for token in tokens}
    missing = [text for text in texts if text not in added]
    if missing:
        raise ArtifactError(f"{folder / files.TOKENIZER} has no token {missing[0]}")
    return [added[text] for text in texts]


def _rows(tensors: "Mapping[str, Tensor]", adapter: Mapping[str, Any], ids: list[int], folder: Path) -> "Tensor":
    """Rows `[N, d]` in the order of `ids`."""
    stored = [tensor for name, tensor in tensors.items() if name.endswith(files.ROWS)]
    indices = adapter.get("token_indices") or adapter.get("trainable_token_indices") or []
    if isinstance(indices, dict):
        indices = [token for layer_indices in indices.values() for token in layer_indices]
    where = folder / files.ADAPTER_CONFIG
    if len(stored) != 1 or len(indices) != len(stored[0]):
        found = ", ".join(str(list(tensor.shape)) for tensor in stored) or "none"
        raise ArtifactError(f"{where} lists {len(indices)} trained tokens, the stored rows are {found}")
    if set(indices) != set(ids):
        raise ArtifactError(f"{where} trains the tokens {sorted(indices)}, the tokenizer appends {ids}")
    return stored[0][[indices.index(token) for token in ids]]


def _projection(folder: Path, name: str, run: RunConfig) -> Linear | None:
    """A linear layer; None if there is no file and the run config does not ask for one."""
    if (folder / name).is_file():
        return _linear(folder / name)
    if run.text(f"add_{name}").lower() == "true":
        raise ArtifactError(f"{folder / name} is missing, but its {files.RUN_CONFIG} says add_{name}: true")
    return None


def _linear(path: Path) -> Linear:
    content = unpickle(path)
    if not isinstance(content, dict) or not isinstance(config := content.get("config"), dict):
        raise ArtifactError(f"{path} is not a projection of the authors' package")
    size, mode = config.get("size", 1), config.get("pooling_mode", "linear")
    if size != 1 or mode != "linear":
        raise ArtifactError(f"{path}: size {size} and pooling_mode '{mode}', known are 1 and 'linear'")
    state = named_tensors(content.get("state_dict"), path)
    if state.keys() != {"projection.weight", "projection.bias"}:
        raise ArtifactError(f"{path} holds {', '.join(sorted(state))}, not projection.weight and projection.bias")
    return Linear(state["projection.weight"], state["projection.bias"])


def _lora(adapter: Mapping[str, Any], tensors: "Mapping[str, Tensor]", folder: Path) -> LoraParams | None:
    where, kind = folder / files.ADAPTER_CONFIG, adapter.get("peft_type")
    if kind == "TRAINABLE_TOKENS":
        return None
    if kind != "LORA":
        raise ArtifactError(f"{where}: peft_type is {kind}, known are TRAINABLE_TOKENS and LORA")
    other = [key for key in _OTHER_LORA if adapter.get(key)]
    if other or adapter.get("bias", "none") != "none":
        raise ArtifactError(f"{where}: {(other or ['bias'])[0]} is set, which LoRA here does not support")
    targets = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name}
    content = {
        "rank": adapter.get("r"),
        "alpha": adapter.get("lora_alpha"),
        "dropout": adapter.get("lora_dropout", 0),
        "targets": sorted(targets),
    }
    return validate(content, LoraParams, where=str(where))
