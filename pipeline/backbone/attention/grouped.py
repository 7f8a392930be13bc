"""Attention of a packed row without autograd: neighbouring sequences of equal length attend in one call.

Rows sorted by length form few groups, and nothing is padded. The cache holds only the beginning that all sequences
share.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pipeline.backbone.attention.per_segment import attend_at_end
from pipeline.backbone.attention.segments import Segments


def group_attention(
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
    """As `segment_attention`; ValueError if the cache holds a sequence's own tokens."""
    if any(packed.prefix):
        raise ValueError("sequences attend in groups only if the cache holds nothing but their shared beginning")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = []
    for own, count in runs(packed.new):
        states = (_split(query, own, count), *(_keys(rows, own, count, packed.shared) for rows in (key, value)))
        parts.append(attend_at_end(*states, scale=scale, window=sliding_window, softcap=softcap))
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])[None], None


def runs(lengths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """The tokens of each run of neighbours of equal length, and the number of its sequences."""
    start = 0
    for length, run in groupby(lengths):
        count = len(list(run))
        yield slice(start, start + count * length), count
        start += count * length


def _split(states: Tensor, own: slice, count: int) -> Tensor:
    """`[count, heads, length, head_dim]` of the tokens `own` of `[1, heads, T, head_dim]`."""
    heads, _, width = states.shape[1:]
    return states[0, :, own].reshape(heads, count, -1, width).transpose(0, 1)


def _keys(states: Tensor, own: slice, count: int, shared: int) -> Tensor:
    mine = _split(states, slice(own.start + shared, own.stop + shared), count)
    return torch.cat([states[:, :, :shared].expand(count, -1, -1, -1), mine], dim=2) if shared else mine
