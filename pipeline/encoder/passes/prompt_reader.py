"""Prompts in, hidden states at the new tokens out, without autograd: the forward pass of inference.

The common beginning of many prompts (a chat template, an instruction) is read once. Prompts are packed where that
equals the plain way on this backbone, else padded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.backbone.attention.registry import GROUPS, with_packed_attention
from pipeline.backbone.attention.segments import Segments
from pipeline.encoder.passes.packed import PackedBackbone, packed_cache
from pipeline.encoder.passes.plain import PlainQueryPass, Pooled, QueryPass
from pipeline.encoder.passes.select import Comparison, packed_attentions, probe_ids


@dataclass(frozen=True)
class Beginning:
    """The tokens that prompts begin with, and their keys and values; None where each prompt reads them itself."""

    ids: tuple[int, ...] = ()
    cache: DynamicCache | None = None

    @property
    def read_again(self) -> int:
        """Tokens of it that each prompt costs."""
        return 0 if self.cache is not None else len(self.ids)


class PromptReader(Protocol):
    """Runs prompts and the new tokens after them; `padded` as in `QueryPass`."""

    @property
    def padded(self) -> bool: ...

    def begin(self, ids: Sequence[int]) -> Beginning:
        """Read what prompts begin with."""
        ...

    def read(
        self,
        beginning: Beginning,
        rests: Sequence[Sequence[int]],
        tokens: Tensor,
        count: int,
        pooled: Pooled | None = None,
    ) -> Tensor:
        """Final-normed hidden states `[B, count, d]` of the last `count` new tokens, in float32 or better.

        `rests` are the ids of each prompt after its beginning, at least one; the new `tokens` `[N, d]` follow them.
        With `pooled`, whose spans are of whole prompts and behind the beginning, a mean stands in front of the states,
        `[B, 1 + count, d]`.
        """
        ...

    def read_all(self, beginning: Beginning, rests: Sequence[Sequence[int]], tokens: Tensor) -> Sequence[Tensor]:
        """Final-normed hidden states `[len(rest) + N, d]` of each rest and the new tokens after it; see `read`."""
        ...


class PackedReader:
    """`PromptReader` without padding: a batch is one row."""

    padded = False

    def __init__(self, backbone: PackedBackbone) -> None:
        self._backbone = backbone

    def begin(self, ids: Sequence[int]) -> Beginning:
        if not ids:
            return Beginning()
        cache = packed_cache()
        self._backbone.hidden(self._backbone.embedded([ids]), Segments.of([len(ids)]), cache)
        return Beginning(tuple(ids), _Unchanged(cache))

    def read(
        self,
        beginning: Beginning,
        rests: Sequence[Sequence[int]],
        tokens: Tensor,
        count: int,
        pooled: Pooled | None = None,
    ) -> Tensor:
        return self._backbone.read(rests, tokens, count, len(beginning.ids), beginning.cache, pooled)

    def read_all(self, beginning: Beginning, rests: Sequence[Sequence[int]], tokens: Tensor) -> Sequence[Tensor]:
        return self._backbone.read_all(rests, tokens, len(beginning.ids), beginning.cache)


class PaddedReader:
    """`PromptReader` through a query pass: each prompt is read whole."""

    def __init__(self, query_pass: QueryPass) -> None:
        self._query_pass, self.padded = query_pass, query_pass.padded

    def begin(self, ids: Sequence[int]) -> Beginning:
        return Beginning(tuple(ids))

    def read(
        self,
        beginning: Beginning,
        rests: Sequence[Sequence[int]],
        tokens: Tensor,
        count: int,
        pooled: Pooled | None = None,
    ) -> Tensor:
        return self._query_pass([[*beginning.ids, *ids] for ids in rests], tokens, count, pooled)

    def read_all(self, beginning: Beginning, rests: Sequence[Sequence[int]], tokens: Tensor) -> Sequence[Tensor]:
        lengths = [len(ids) + len(tokens) for ids in rests]
        hidden = self.read(beginning, rests, tokens, max(lengths))
        return [row[-length:] for row, length in zip(hidden, lengths, strict=True)]


class _Unchanged(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """A cache that every forward pass begins with and none adds to."""

    def __init__(self, cache: DynamicCache) -> None:
        super().__init__()
        self.layers = cache.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


# Lengths of probed prompts: two equal neighbours, one token, one longer than the others.
_LENGTHS = (9, 9, 1, 14)
_SHARED = 3
_NEW = 3


def prompt_reader(backbone: Any) -> PromptReader:
    """The fastest reader that equals the plain one on this causal LM; BackboneError if not even that one runs."""
    plain = PaddedReader(PlainQueryPass(backbone))
    comparison = Comparison[PromptReader](backbone, _probe(backbone), plain, names=("hidden states",))
    return comparison.first_equal(_candidates(backbone)) or plain


def _candidates(backbone: Any) -> Iterator[tuple[str, PromptReader]]:
    trained = packed_attentions(backbone, "auto")
    # The attention of training keeps what a backward pass needs; the one by groups does not.
    attentions = dict.fromkeys(GROUPS if attention == "segments" else attention for attention in trained)
    for attention in attentions:
        rows = PackedBackbone(with_packed_attention(backbone, attention), attention)
        yield f"packed reading with {attention} attention", PackedReader(rows)


def _probe(backbone: Any) -> Callable[[PromptReader], list[Tensor]]:
    """What a reader reads of a few prompts, with their beginning read once and with each."""
    embed = backbone.get_input_embeddings()
    ids = iter(probe_ids(embed, 0, _SHARED + sum(_LENGTHS) + _NEW))
    beginning, *rests = (list(islice(ids, length)) for length in (_SHARED, *_LENGTHS))
    whole = [[*beginning, *rest] for rest in rests]
    pooled = Pooled([slice(max(_SHARED, len(ids) - 3), len(ids)) for ids in whole], with_tokens=True)
    with torch.no_grad():
        tokens = embed(torch.tensor([*ids], device=embed.weight.device))

    @torch.inference_mode()
    def read(reader: PromptReader) -> list[Tensor]:
        once = reader.read(reader.begin(beginning), rests, tokens, _NEW - 1, pooled)
        return [torch.cat([once, reader.read(reader.begin([]), whole, tokens, _NEW - 1, pooled)])]

    return read
