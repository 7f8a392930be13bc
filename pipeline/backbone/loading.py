"""The frozen language model and its tokenizer: identity, loading, and copies that share its weights."""

import contextlib
import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from pipeline.core.config import Params
from pipeline.core.errors import BackboneError, first_line
from pipeline.core.files import digest_of, file_sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Template = Literal["raw", "chat", "echo"]
DType = Literal["bfloat16", "float16", "float32"]
Quantize = Literal["8bit", "4bit"]
DTYPE_BYTES: dict[DType, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
Keep = Literal["start", "end"]
Pool = Literal["tokens", "text", "both"]  # what an embedding is the mean of: see `train.pool`

# The files that decide what a model folder computes: weights, configs, tokenizer, modules, code.
_IDENTITY_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.jinja", "*.py")


def _json_values(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Checks what YAML made of values without quotes: a template, a manifest and an encoder's config take JSON only."""
    for key, value in kwargs.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                f"{key} is {value} ({type(value).__name__}), which is not JSON: put it in quotes"
            ) from None
    return kwargs


class BackboneParams(Params):
    """The language model whose answers are encoded."""

    name: str = Field(description="hub name or local folder")
    revision: str | None = Field(default=None, description="commit on the hub; pin it")
    dtype: DType = "bfloat16"
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_json_values)] = Field(
        default_factory=dict, description="variables of the chat template, e.g. {enable_thinking: false}"
    )
    trust_remote_code: bool = False


def dtype_name(dtype: "DType | torch.dtype | str") -> DType:
    """A dtype, of torch or by name, as its name; BackboneError if no model is loaded in it."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise BackboneError(f"{name} is none of {', '.join(DTYPE_BYTES)}", argument="dtype")
    return name


def identify(name: str, revision: str | None) -> dict[str, str]:
    """Hub name and commit, or the sha256 of a local folder's files; BackboneError if the folder holds no model."""
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or (name.count("/") != 1 and "/" in name):
            raise BackboneError(f"model folder {name} does not exist")
        check_not_missing(name, revision)
        return {"name": name, "revision": revision or "main"}
    files = sorted({path for pattern in _IDENTITY_FILES for path in folder.rglob(pattern)})
    if not files:
        raise BackboneError(f"{name} is a folder without model weights")
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    return {"name": name, "sha256": digest_of(hashes)}


def same_model(identity: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    """Whether what names or holds a model's identity is `wanted`; a local folder is its content, wherever it lies."""
    pinned = {key: value for key, value in wanted.items() if key != "name" or "sha256" not in wanted}
    return pinned.items() <= identity.items()


def check_not_missing(name: str, revision: str | None) -> None:
    """Raises BackboneError if `name`, of the form `a/b`, is a folder that is not here and no name on the hub.

    It is a folder where `a` is one, unless a revision is named or the hub's cache has the model.
    """
    parent = Path(name).parent
    local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    if local or revision is not None or name.count("/") != 1 or not parent.is_dir():
        return
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    if not (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")).is_dir():
        raise BackboneError(
            f"model folder {name} does not exist, though the folder {parent} does (models are not in git: a clone or a "
            "DVC experiment in a folder of its own lacks them). If a model of the hub is meant, name its revision"
        )


def load_tokenizer(params: BackboneParams) -> "PreTrainedTokenizerBase":
    """The backbone's tokenizer; BackboneError if it cannot be loaded."""
    from transformers import AutoTokenizer

    check_not_missing(params.name, params.revision)
    try:
        return AutoTokenizer.from_pretrained(
            params.name, revision=params.revision, trust_remote_code=params.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(params, error) from None


def load_config(params: BackboneParams) -> Any:
    """The backbone's text config; BackboneError if it cannot be read."""
    from transformers import AutoConfig

    check_not_missing(params.name, params.revision)
    try:
        config = AutoConfig.from_pretrained(
            params.name, revision=params.revision, trust_remote_code=params.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(params, error) from None
    return config.get_text_config()


def load_backbone(
    params: BackboneParams, device: "torch.device | str" = "cpu", quantize: Quantize | None = None
) -> "PreTrainedModel":
    """The causal LM in eval mode, frozen; BackboneError if it cannot be loaded or quantised.

    Quantised, its linear layers hold 8-bit integers (LLM.int8) or 4-bit normal floats in blocks (NF4, the scales
    quantised again); embeddings, norms and the output head stay in `params.dtype`, in which 4-bit layers compute.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_not_missing(params.name, params.revision)
    # bitsandbytes packs the weights on their final device: a quantised model is not moved afterwards.
    options = placement(device) if quantize is None else _quantized(quantize, params, device)
    try:
        with without_weight_bars():
            model = AutoModelForCausalLM.from_pretrained(
                params.name,
                revision=params.revision,
                dtype=getattr(torch, params.dtype),
                trust_remote_code=params.trust_remote_code,
                **options,
            )
    except (OSError, ValueError, ImportError, json.JSONDecodeError, SafetensorError) as error:
        raise _cannot_load(params, error) from None
    model = model.to(device) if quantize is None else _differentiable(model)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def without_weight_bars() -> Iterator[None]:
    """In the block transformers shows no bar over the weights of a model; downloads keep theirs."""
    from transformers.utils import logging

    def hidden(make: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return make(*arguments, **options | {"disable": True})

    before = logging.set_tqdm_hook(hidden)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def placement(device: "torch.device | str") -> dict[str, Any]:
    """What has `from_pretrained` read weights straight onto a GPU, instead of into main memory first."""
    import torch

    return {"device_map": {"": device}} if torch.device(device).type == "cuda" else {}


def hub_reason(error: Exception, name: str) -> str:
    """Why `name` cannot be read, in one line; of a gated repository also what opens it."""
    reason = first_line(error)
    causes = (error, error.__cause__, error.__context__)
    if any(type(cause).__name__ == "GatedRepoError" for cause in causes):
        page = f"https://huggingface.co/{name}"
        reason += f" It is gated: accept its licence at {page}, then run `hf auth login` or set HF_TOKEN"
    return reason


def _quantized(quantize: Quantize, params: BackboneParams, device: "torch.device | str") -> dict[str, Any]:
    import torch
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise BackboneError(
            f"{quantize} needs bitsandbytes, which is not installed: pip install 'llm2vec-gen-pipeline[quantize]', "
            "or set it to null",
            argument="quantize",
        )
    config = BitsAndBytesConfig(
        load_in_8bit=quantize == "8bit",
        load_in_4bit=quantize == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, params.dtype),
    )
    return {"quantization_config": config, "device_map": {"": device}}


def _differentiable(model: "PreTrainedModel") -> "PreTrainedModel":
    # On a CPU with bfloat16 instructions a 4-bit layer repacks itself at its first forward without autograd (the prefix
    # of a query), and silently passes no gradient from then on.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _cannot_load(params: BackboneParams, error: Exception) -> BackboneError:
    revision = f" at revision {params.revision}" if params.revision else ""
    return BackboneError(f"cannot load backbone '{params.name}'{revision}: {hub_reason(error, params.name)}")


def share_weights(model: Any) -> Any:
    """A copy with its own modules and config that shares every parameter, buffer and bitsandbytes state of `model`."""
    states = (getattr(module, name, None) for module in model.modules() for name in ("state", "quant_state"))
    shared = itertools.chain(model.parameters(), model.buffers(), states)
    return copy.deepcopy(model, {id(value): value for value in shared if value is not None})
