"""Attention of a packed row with torch's flex attention: one compiled kernel on CUDA, slow and exact on a CPU."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pipeline.backbone.attention.segments import SHARED, Segments


@lru_cache(maxsize=8)
def block_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    """A query sees keys of its own sequence or shared ones, not later ones, and none beyond the window.

    Cached, because all layers of a forward pass ask for the same one or two.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    # Tensors made in inference mode cannot be used in training.
    with torch.inference_mode(False):
        query_owner, query_at = segments.queries(device)
        key_owner, key_at = segments.keys(device)

        def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (key_owner[key] == query_owner[query]) | (key_owner[key] == SHARED)
            seen = own & (key_at[key] <= query_at[query])
            return seen if window is None else seen & (key_at[key] > query_at[query] - window)

        return create_block_mask(visible, None, None, len(query_at), len(key_at), device=device)


@lru_cache(maxsize=2)
def _kernel(device: torch.device) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    function: Callable[..., Any] = flex_attention
    return torch.compile(function, dynamic=True) if device.type == "cuda" else function


def flex_packed_attention(
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
    """As `segment_attention`."""

    def capped(score: Tensor, *_where: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    attended = _kernel(query.device)(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=block_mask(packed, sliding_window, query.device),
        scale=scaling,
        enable_gqa=True,
    )
    return attended.transpose(1, 2).contiguous(), None
