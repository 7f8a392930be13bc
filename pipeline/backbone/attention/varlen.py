"""Attention of a packed row in one call of the flash kernel for sequences of different lengths (CUDA, half precision).

The kernel takes queries and keys in order of their sequences, and their cumulative lengths. Causality is aligned at the
end: the last query of a sequence sees all of its keys. Window sizes exclude the token itself.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pipeline.backbone.attention.segments import Segments


@dataclass(frozen=True)
class VarlenLayout:
    """Arguments of the kernel for a packed row.

    Attributes:
        keys: `[sum(total)]`, indices of the keys in the kernel's order; None: they are in it.
        query_ends: int32 `[sequences + 1]`, cumulative lengths of the queries.
        key_ends: int32 `[sequences + 1]`, cumulative lengths of the keys.
        longest_query: most queries of a sequence.
        longest_key: most keys of a sequence.
    """

    keys: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, segments: Segments, device: torch.device) -> "VarlenLayout":
        """Each sequence reads the shared tokens, its own cached ones, and its new ones."""
        reads = [torch.arange(piece.start, piece.stop) for _, pieces in segments.slices() for piece in pieces]
        return cls(
            torch.cat(reads).to(device) if segments.cached else None,
            _ends(segments.new, device),
            _ends(segments.total, device),
            max(segments.new),
            max(segments.total),
        )


def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


@lru_cache(maxsize=4)
def _layout(segments: Segments, device: torch.device) -> VarlenLayout:
    # All layers of a forward pass ask for the same one. Tensors made in inference mode cannot be used in training.
    with torch.inference_mode(False):
        return VarlenLayout.of(segments, device)


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
    """As `segment_attention`, without soft-capped scores.

    Raises:
        ValueError: the scores are soft-capped.
    """
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None:
        raise ValueError("the varlen kernel has no soft-capped scores")
    layout = _layout(packed, query.device)
    keys, values = (_rows(states, layout.keys) for states in (key, value))
    attended: Any = varlen_attn(
        query[0].transpose(0, 1),
        keys,
        values,
        layout.query_ends,
        layout.key_ends,
        layout.longest_query,
        layout.longest_key,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
    )
    return attended[None], None


def _rows(states: Tensor, index: Tensor | None) -> Tensor:
    """`[keys, kv_heads, head_dim]` of `[1, kv_heads, keys, head_dim]`, gathered."""
    rows = states[0].transpose(0, 1)
    return rows if index is None else rows.index_select(0, index)
