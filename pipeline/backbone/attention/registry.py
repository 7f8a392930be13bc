"""Attention of packed rows: the implementations, which of them fits, and setting one on a backbone.

Each implementation is registered with transformers' attention interface and gets the lengths of the sequences as the
keyword `packed` of the backbone's forward. No mask is registered for these names: transformers then makes none, and a
GPU does not wait for the host to look at the mask.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from transformers import AttentionInterface

from pipeline.backbone.attention.flex import flex_packed_attention
from pipeline.backbone.attention.grouped import group_attention
from pipeline.backbone.attention.per_segment import segment_attention
from pipeline.backbone.attention.varlen import varlen_attention
from pipeline.backbone.loading import share_weights
from pipeline.core.errors import BackboneError

Implementation = Literal["segments", "varlen", "flex"]
Attention = Literal["auto", "segments", "varlen", "flex"]
GROUPS = "groups"  # without autograd, see `group_attention`

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "segments": segment_attention,
    "varlen": varlen_attention,
    "flex": flex_packed_attention,
}
# Kinds of layers whose attention the packed functions compute.
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_VARLEN_HEAD_DIM = 256
_HALF = (torch.bfloat16, torch.float16)
_seen_windows: set[int | None] = set()
# Keywords that change nothing in eval mode. Any other is part of the attention, such as the sinks of GPT-OSS.
_WITHOUT_EFFECT = {"cache_position", "dropout", "is_causal", "output_attentions", "position_ids", "use_cache"}
_COMPUTED = {"packed", "scaling", "softcap"}


def _registered(name: str) -> str:
    return f"packed_{name}"


def _watched(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    sliding_window: int | None = None,
    **arguments: Any,
) -> Any:
    _seen_windows.add(sliding_window)
    unknown = {name for name, value in arguments.items() if value is not None} - _COMPUTED - _WITHOUT_EFFECT
    unknown |= set() if attention_mask is None else {"attention_mask"}
    if unknown:
        raise ValueError(f"its attention depends on {', '.join(sorted(unknown))}")
    return segment_attention(module, query, key, value, None, sliding_window=sliding_window, **arguments)


_REGISTERED: dict[str, Callable[..., Any]] = {**_FUNCTIONS, GROUPS: group_attention, "watched": _watched}
for _name, _function in _REGISTERED.items():
    AttentionInterface.register(_registered(_name), _function)


@contextlib.contextmanager
def use_attention(backbone: Any, implementation: str) -> Iterator[None]:
    """In the block the backbone attends to packed rows; outside it is unchanged. One thread at a time."""
    config = backbone.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = _registered(implementation)
    try:
        yield
    finally:
        config._attn_implementation = before


def with_packed_attention(backbone: Any, implementation: str) -> Any:
    """A copy that shares the backbone's weights and always attends to packed rows.

    Threads may share it, and the backbone itself may generate meanwhile.
    """
    packed = share_weights(backbone)
    packed.get_decoder().config._attn_implementation = _registered(implementation)
    return packed


def choose_attention(backbone: Any, requested: Attention) -> tuple[Implementation, str]:
    """The implementation to use, and why; BackboneError if the requested one cannot run here."""
    if requested == "auto":
        return _automatic(backbone)
    if requested not in get_args(Attention):
        known = ", ".join(get_args(Attention))
        raise BackboneError(f"'{requested}' is unknown (known: {known})", argument="attention")
    if obstacle := _OBSTACLES[requested](backbone):
        raise BackboneError(f"{requested} cannot run here: {obstacle}; use auto", argument="attention")
    return requested, "as set"


def _automatic(backbone: Any) -> tuple[Implementation, str]:
    if _device(backbone).type != "cuda":
        return "segments", "one call a sequence is the fastest without a GPU"
    obstacle = _varlen_obstacle(backbone)
    if obstacle is None:
        return "varlen", "the flash kernel takes all sequences of a row at once"
    half = backbone.dtype in _HALF
    return "flex" if half else "segments", f"the flash kernel cannot: {obstacle}"


def _varlen_obstacle(backbone: Any) -> str | None:
    """What keeps the flash kernel from computing this backbone's attention."""
    config = backbone.get_decoder().config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if _device(backbone).type != "cuda":
        return "it needs a CUDA device"
    if backbone.dtype not in _HALF:
        return f"it computes in half precision, the backbone in {str(backbone.dtype).removeprefix('torch.')}"
    if getattr(config, "attn_logit_softcapping", None):
        return "it cannot soft-cap scores"
    return f"its heads have at most {_VARLEN_HEAD_DIM} dimensions, here {width}" if width > _VARLEN_HEAD_DIM else None


def _flex_obstacle(backbone: Any) -> str | None:
    return None if _device(backbone).type == "cuda" else "its backward pass needs a CUDA device"


_OBSTACLES: dict[Implementation, Callable[[Any], str | None]] = {
    "segments": lambda _backbone: None,
    "varlen": _varlen_obstacle,
    "flex": _flex_obstacle,
}


def _device(backbone: Any) -> torch.device:
    return backbone.get_input_embeddings().weight.device


def check_layers(backbone: Any, run: Callable[[str], object]) -> None:
    """Refuse layers whose attention depends on more than the packed functions compute.

    `run(name)` runs a packed row with that attention. A short probe cannot show a window longer than itself, so the
    window that the layers pass on is checked.

    Raises:
        BackboneError: a layer's kind is unknown, the window of sliding ones does not reach the function, or an argument
            does that the functions do not compute.
    """
    config = backbone.get_decoder().config
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - _LAYER_TYPES:
        raise BackboneError(f"{type(backbone).__name__} has layers of kind {', '.join(sorted(unknown))}")
    _seen_windows.clear()
    run("watched")
    if not _seen_windows:
        raise BackboneError(f"{type(backbone).__name__} does not use transformers' attention interface")
    window = getattr(config, "sliding_window", None)
    if window and (not kinds or "sliding_attention" in kinds) and window not in _seen_windows:
        raise BackboneError(f"{type(backbone).__name__} does not tell its attention of its sliding window")
