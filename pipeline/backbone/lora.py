"""LoRA on the student: the query pass runs on an adapted backbone, the response pass on the frozen one.

The adapted backbone is a second tree of modules that shares the tensors of the first: answering and decoding never see
an adapter, also when a checkpointed response pass runs again within backward. The prefix of a query then depends on
what is trained, so the query pass needs gradients through the whole query.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline.backbone.loading import share_weights
from pipeline.core.config import Params
from pipeline.core.errors import TrainingError
from pipeline.core.files import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn


CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# How peft names what it wraps; files with other names do not load there.
_PREFIX = "base_model.model."


class LoraParams(Params):
    """The paper's ablation has rank 8."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="ends of module names; all-linear spares the output head"
    )


def add_adapter(
    backbone: Any, *, rank: int, alpha: float, dropout: float, targets: list[str] | Literal["all-linear"], seed: int
) -> Any:
    """A copy of the backbone that shares its tensors and has trainable adapters in float32; `backbone` is unchanged.

    At first it computes what `backbone` computes: the second matrix of each adapter starts at zero. `targets` are ends
    of names of linear layers; the update is scaled by alpha / rank; `AdaptedQueryPass` switches dropout on in training.

    Raises:
        TrainingError: no layer has such a name, or one cannot be adapted.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    adapted = share_weights(backbone)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type=None)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            get_peft_model(adapted, config)
        except ValueError as error:
            reason = " ".join(str(error).split())[:300]
            raise TrainingError(f"{targets} cannot be adapted: {reason}", argument="targets") from None
    return adapted.eval()


def check_adapter(adapted: Any, targets: list[str] | Literal["all-linear"]) -> None:
    """Raises TrainingError if a layer was adapted that trains nothing: an embedding, or the output head.

    Adapters are read where hidden states are made, and `adapter_parameters` are those of linear layers.
    """
    if any(".lora_embedding_" in name for name, _ in adapted.named_parameters()):
        raise TrainingError(f"{targets} names embeddings: only linear layers are adapted", argument="targets")
    head = adapted.get_output_embeddings()
    if head is not None and any(".lora_" in f".{name}" for name, _ in head.named_parameters()):
        raise TrainingError(f"{targets} names the output head, which reads no text: leave it out", argument="targets")


def adapter_parameters(adapted: Any) -> "dict[str, nn.Parameter]":
    """The adapters' parameters under peft's names, in a fixed order."""
    return {
        _PREFIX + name.replace(".default.", "."): parameter
        for name, parameter in adapted.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }


def save_adapter(parameters: "Mapping[str, Tensor]", folder: Path, params: LoraParams, backbone: str) -> None:
    """Write `adapter_parameters` as peft does, without version, path or date: equal adapters give equal bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in parameters.items()}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    config = {
        "base_model_name_or_path": backbone,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": params.alpha,
        "lora_dropout": params.dropout,
        "peft_type": "LORA",
        "r": params.rank,
        "target_modules": params.targets,
        "task_type": None,
    }
    write_json(folder / CONFIG_FILE, config)


def load_adapter(backbone: Any, folder: Path, params: LoraParams) -> Any:
    """As `add_adapter`, frozen, with the weights of a folder; TrainingError if it holds none that fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    adapted = add_adapter(backbone, **params.model_dump(), seed=0)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from None
    set_adapter(adapted, tensors, where=str(folder / WEIGHTS_FILE))
    return adapted.requires_grad_(False)


def set_adapter(adapted: Any, tensors: "Mapping[str, Tensor]", *, where: str) -> None:
    """Copy weights into the adapters; TrainingError if a name is missing or unknown, or a shape differs."""
    import torch

    parameters = adapter_parameters(adapted)
    wrong = sorted(
        {name for name in parameters.keys() & tensors.keys() if parameters[name].shape != tensors[name].shape}
        | (parameters.keys() ^ tensors.keys())
    )
    if wrong:
        raise TrainingError(
            f"{where} holds {len(tensors)} tensors, the adapter on this backbone has {len(parameters)}: {len(wrong)} "
            f"differ, the first is {wrong[0]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
