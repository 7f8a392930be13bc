"""Attention of a packed row, one sequence at a time: on every device, in every precision, with soft-capped scores too.

Only queries, keys and values are kept for the backward pass, in their own precision; the rest is recomputed. On a CPU
half precision is computed in float32: torch's bfloat16 backward pass takes three times as long there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.backbone.attention.segments import Segments

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row, as transformers calls it.

    `query` is `[1, heads, sum(new), head_dim]`, `key` and `value` `[1, kv_heads, cached + sum(new), head_dim]`. A token
    sees `sliding_window` tokens, itself included; with `softcap` c scores become `c * tanh(score / c)`.

    Returns:
        `[1, sum(new), heads, head_dim]`, and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = partial(attend_at_end, scale=scale, window=sliding_window, softcap=softcap)
    return _SegmentAttention.apply(query, key, value, packed, attend), None  # type: ignore[no-untyped-call]


class _SegmentAttention(torch.autograd.Function):
    """`attend` on each sequence; the backward pass runs it again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: Segments, attend: Attend) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.packed, ctx.attend = packed, attend
        _, heads, tokens, _ = query.shape
        output = query.new_empty(1, tokens, heads, value.shape[-1])
        for own, pieces in packed.slices():
            attended = attend(_exact(query[:, :, own]), _gather(key, pieces), _gather(value, pieces))
            output[:, own] = attended.transpose(1, 2)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        gradients = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for own, pieces in ctx.packed.slices():
            inputs = _exact(query[:, :, own]), _gather(key, pieces), _gather(value, pieces)
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in inputs]
                attended = ctx.attend(*leaves)
            to_query, *to_states = torch.autograd.grad(attended, leaves, _exact(upstream[:, own]).transpose(1, 2))
            gradients[0][:, :, own] = to_query
            for gradient, found in zip(gradients[1:], to_states, strict=True):
                _scatter_add(gradient, pieces, found)
        return *gradients, None, None


def attend_at_end(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Attention of the last tokens of sequences, `[B, heads, n, head_dim]`, to all `t` tokens, aligned at the end."""
    mask = _mask(query.shape[2], key.shape[2], window, query.device)
    if softcap is not None:
        return _capped(query, key, value, mask, scale, softcap)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril() if mask is None else mask
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value


def _mask(new: int, total: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which of `total` tokens each of the last `new` sees, `[new, total]`; None where that is plain causality."""
    if new == total and (window is None or total <= window):
        return None
    at = torch.arange(total - new, total, device=device)[:, None]
    seen = torch.arange(total, device=device)[None]
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)


def _exact(states: Tensor) -> Tensor:
    half = states.dtype in (torch.bfloat16, torch.float16)
    return states.float() if half and states.device.type == "cpu" else states


def _gather(states: Tensor, pieces: list[slice]) -> Tensor:
    parts = [_exact(states[:, :, piece]) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _scatter_add(gradient: Tensor, pieces: list[slice], found: Tensor) -> None:
    parts = torch.split(found, [piece.stop - piece.start for piece in pieces], dim=2)
    for piece, part in zip(pieces, parts, strict=True):
        gradient[:, :, piece] += part.to(gradient.dtype)
