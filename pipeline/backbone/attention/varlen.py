"""Attention of a packed row in one call of the flash kernel for sequences of different lengths (CUDA, half precision).

The kernel takes queries and keys in order of their sequences, and their cumulative lengths. Causality is aligned at the
end: the last query of a sequence sees all of its keys. Window sizes exclude the token itself.
"""

from typing import Any

from torch import Tensor

from pipeline.backbone.attention.segments import Segments, index_tensors


def varlen_attention(
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
    """As `segment_attention`; ValueError if scores are soft-capped."""
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None:
        raise ValueError("the varlen kernel has no soft-capped scores")
    index = index_tensors(packed, query.device)
    keys, values = (_rows(states, index.keys) for states in (key, value))
    attended: Any = varlen_attn(
        query[0].transpose(0, 1),
        keys,
        values,
        index.query_ends,
        index.key_ends,
        max(packed.new),
        max(packed.total),
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    return attended[None], None


def _rows(states: Tensor, index: Tensor | None) -> Tensor:
    """`[keys, kv_heads, head_dim]` of `[1, kv_heads, keys, head_dim]`, gathered."""
    rows = states[0].transpose(0, 1)
    return rows if index is None else rows.index_select(0, index)
