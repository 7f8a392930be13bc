"""What fused functions become on a GPU, for the walk: they cannot be compiled here, and CUDA's kernels are not there.

    act(gate) * up       one kernel each way; saves gate and up. torch's compiler makes one kernel of a chain of
                         elementwise operations and one of its backward, and saves the inputs of the chain.
    apply_rotary_pos_emb a kernel for queries and one for keys, each way; saves cosines and sines
    rms_norm             `_fused_rms_norm` and its backward, a kernel each; saves the input and a float32 a row
    scaled_dot_product_attention    the flash kernel in half precision without a mask, else the memory-efficient one

This is read from torch's sources and documentation: only a real GPU counts the real kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op


def stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a function that `pipeline.backbone.fused` compiles."""
    return _gated if function.__name__ == "_gate" else _rotated


def _gated(_activation: Any, gate: Tensor, up: Tensor) -> Tensor:
    return _gate(gate, up)


def _rotated(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return _rotate(queries, cos, sin), _rotate(keys, cos, sin)


@custom_op("walk::gate", mutates_args={})
def _gate(gate: Tensor, up: Tensor) -> Tensor:
    raise NotImplementedError


@custom_op("walk::gate_backward", mutates_args={})
def _gate_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@custom_op("walk::rotate", mutates_args={})
def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    raise NotImplementedError


def rms_norm(hidden: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """For `torch.nn.functional.rms_norm`."""
    return _norm(hidden, weight)[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """For `torch.nn.functional.scaled_dot_product_attention`: the kernels that torch chooses on an H100."""
    aten = torch.ops.aten
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    bias = None
    if attn_mask is not None:
        bias = torch.where(attn_mask, 0.0, float("-inf")) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    keeps = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    attend = aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, bias, keeps, dropout_p, is_causal, scale=scale)[0]


@custom_op("walk::norm", mutates_args={})
def _norm(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@custom_op("walk::norm_backward", mutates_args={})
def _norm_backward(gradient: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    raise NotImplementedError


@_norm.register_fake
def _(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)


@_norm_backward.register_fake
def _(gradient: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(hidden)


@_gate.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@_gate_backward.register_fake
def _(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


@_rotate.register_fake
def _(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(states)


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _keep_angles(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _keep_scale(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _back_through_norm(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None]:
    return _norm_backward(gradient, *ctx.saved_tensors), None


def _back_through_gate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return _gate_backward(gradient, *ctx.saved_tensors)


def _back_through_rotation(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _rotate(gradient, *ctx.saved_tensors), None, None


_gate.register_autograd(_back_through_gate, setup_context=_keep_all)
_rotate.register_autograd(_back_through_rotation, setup_context=_keep_angles)
_norm.register_autograd(_back_through_norm, setup_context=_keep_scale)
