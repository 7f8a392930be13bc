"""Prompts in, hidden states at the new tokens behind them out, without autograd: the one forward pass of inference.

What many prompts begin with (a chat template, an instruction) is read once, and every batch goes on from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.encoder.packing import PackedBackbone, interleave
from pipeline.encoder.passes import QueryPass
from pipeline.encoder.precision import at_least_float32
from pipeline.encoder.segments import Segments


@dataclass(frozen=True)
class Beginning:
    """What prompts begin with.

    Attributes:
        ids: its tokens.
        cache: its keys and values; None where each prompt reads them itself.
    """

    ids: tuple[int, ...] = ()
    cache: DynamicCache | None = None

    @property
    def read_again(self) -> int:
        """Tokens of it that each prompt costs all the same."""
        return 0 if self.cache is not None else len(self.ids)


class PromptReader(Protocol):
    """Runs prompts and the new tokens behind them.

    Attributes:
        padded: see `QueryPass`.
    """

    @property
    def padded(self) -> bool:
        """See the class."""
        ...

    def begin(self, ids: Sequence[int]) -> Beginning:
        """Read what prompts begin with."""
        ...

    def read(self, beginning: Beginning, rests: Sequence[Sequence[int]], tokens: Tensor, count: int) -> Tensor:
        """Final-normed hidden states `[B, count, d]` of the last `count` new tokens, in float32 or better.

        Args:
            beginning: of all the prompts.
            rests: token ids of each prompt behind it, at least one.
            tokens: rows of the new tokens `[N, d]`, appended to each prompt.
            count: how many of the last new tokens to return.
        """
        ...


class PackedReader:
    """`PromptReader` without padding: a batch is one row."""

    padded = False

    def __init__(self, backbone: PackedBackbone) -> None:
        """`backbone` runs packed rows."""
        self._backbone = backbone

    def begin(self, ids: Sequence[int]) -> Beginning:
        """See `PromptReader.begin`."""
        if not ids:
            return Beginning()
        # Without the config: a sliding-window cache layer would forget the start of a long beginning.
        cache = DynamicCache()
        self._backbone.hidden(self._backbone.words([ids]), Segments.of([len(ids)]), cache)
        return Beginning(tuple(ids), _Unchanged(cache))

    def read(self, beginning: Beginning, rests: Sequence[Sequence[int]], tokens: Tensor, count: int) -> Tensor:
        """See `PromptReader.read`."""
        words = self._backbone.words(rests)
        row = interleave(torch.split(words, [len(ids) for ids in rests]), [tokens.to(words.dtype)] * len(rests))
        lengths = [len(ids) + len(tokens) for ids in rests]
        hidden = self._backbone.hidden(row, Segments.of(lengths, shared=len(beginning.ids)), beginning.cache)
        ends = torch.tensor(list(accumulate(lengths)), device=row.device)[:, None]
        return at_least_float32(hidden[ends + torch.arange(-count, 0, device=row.device)])


class PaddedReader:
    """`PromptReader` through a query pass: each prompt is read whole."""

    def __init__(self, queries: QueryPass) -> None:
        """`queries` runs the prompts."""
        self._queries = queries

    @property
    def padded(self) -> bool:
        """See `PromptReader`."""
        return self._queries.padded

    def begin(self, ids: Sequence[int]) -> Beginning:
        """See `PromptReader.begin`."""
        return Beginning(tuple(ids))

    def read(self, beginning: Beginning, rests: Sequence[Sequence[int]], tokens: Tensor, count: int) -> Tensor:
        """See `PromptReader.read`."""
        return self._queries.query_pass([[*beginning.ids, *ids] for ids in rests], tokens, count)


class _Unchanged(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """A cache that every forward pass begins with and none adds to."""

    def __init__(self, cache: DynamicCache) -> None:
        super().__init__()
        self.layers = cache.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What is cached of the layer, followed by the new states."""
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)
