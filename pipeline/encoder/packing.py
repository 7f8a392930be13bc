"""Both passes without padding: a batch is one row of segments that cannot see each other.

The frozen prefix of a query influences nothing that is trained, so it runs without autograd into a key-value cache, and
only the new tokens run with autograd against it. What all queries of a batch begin with (a chat template, an
instruction) runs once. Cross-entropy is taken at response positions only, in chunks, so full logits never exist. Loss
and gradients equal `PlainPasses` up to rounding.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from pipeline.encoder.linear_cross_entropy import linear_cross_entropy
from pipeline.encoder.passes import Passes, PlainPasses
from pipeline.errors import BackboneError

log = logging.getLogger(__name__)

_NAME = "packed_segments"


@dataclass(frozen=True)
class Segments:
    """Lengths of the sequences in a packed row.

    Attributes:
        new: tokens of each sequence in the row.
        prefix: tokens of each sequence in the cache.
        shared: tokens at the start of the cache that every sequence begins with.
    """

    new: tuple[int, ...]
    prefix: tuple[int, ...]
    shared: int = 0

    @classmethod
    def of(cls, new: Sequence[int], prefix: Sequence[int] | None = None, shared: int = 0) -> "Segments":
        """Segments of these lengths, none of their own tokens cached unless `prefix` is given."""
        return cls(tuple(new), tuple(prefix) if prefix else (0,) * len(new), shared)

    @property
    def cached(self) -> int:
        """Tokens in the cache."""
        return self.shared + sum(self.prefix)

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Of each sequence: where its own cached tokens are in the cache, and its tokens in the row."""
        for (p0, p1), (n0, n1) in zip(_bounds(self.prefix), _bounds(self.new), strict=True):
            yield slice(self.shared + p0, self.shared + p1), slice(n0, n1)

    def positions(self, device: torch.device) -> Tensor:
        """Position ids `[1, sum(new)]`, going on behind what is cached of each sequence."""
        starts = [self.shared + length for length in self.prefix]
        parts = [torch.arange(start, start + length) for start, length in zip(starts, self.new, strict=True)]
        return torch.cat(parts)[None].to(device)


def _bounds(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    return pairwise(accumulate(lengths, initial=0))


def packed_attention(
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
    """Causal attention within each segment: one SDPA call a segment.

    Args:
        module: the attention layer, unused.
        query: `[1, heads, sum(new), head_dim]`.
        key: `[1, kv_heads, cached + sum(new), head_dim]`, as `value`.
        value: see `key`.
        attention_mask: None; the segments say all.
        packed: the segments.
        scaling: of the scores.
        sliding_window: how far back a token sees, itself included.
        softcap: refused.

    Returns:
        `[1, sum(new), heads, head_dim]`, and no weights.
    """
    if softcap is not None:
        raise BackboneError("attention with soft-capped scores cannot be packed")
    outputs = []
    for before, own in packed.slices():
        pieces = slice(0, packed.shared), before, slice(packed.cached + own.start, packed.cached + own.stop)
        keys, values = (torch.cat([states[:, :, piece] for piece in pieces], dim=2) for states in (key, value))
        seen = packed.shared + before.stop - before.start
        mask = _mask(own.stop - own.start, seen, sliding_window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, own], keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _mask(new: int, prefix: int, window: int | None, device: torch.device) -> Tensor | None:
    if prefix == 0 and (window is None or new <= window):
        return None
    at = torch.arange(prefix, prefix + new, device=device)[:, None]
    seen = torch.arange(prefix + new, device=device)[None]
    mask = seen <= at
    return mask if window is None else mask & (seen > at - window)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None


AttentionInterface.register(_NAME, packed_attention)
AttentionMaskInterface.register(_NAME, _no_mask)


class PackedPasses:
    """`Passes` over packed rows; see the module."""

    def __init__(self, backbone: Any, chunk: int = 256) -> None:
        """Args: backbone: a frozen causal LM; chunk: response positions whose logits exist at a time.

        Raises:
            BackboneError: the architecture does not use the attention interface, or its head does more than project.
        """
        self._lm, self._chunk = backbone, chunk
        self._embed = backbone.get_input_embeddings()
        _check_architecture(backbone)

    def query_pass(self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int) -> Tensor:
        """See `Passes.query_pass`."""
        rows, count = len(query_ids), len(tokens)
        shared = shared_prefix(query_ids)
        cache = self._prefix_cache(query_ids, shared)
        new = tokens.to(self._embed.weight.dtype).repeat(rows, 1)[None]
        segments = Segments.of([count] * rows, [len(ids) - shared for ids in query_ids], shared)
        return self._body(new, segments, cache).view(rows, count, -1)[:, -read:].float()

    def response_pass(self, soft_prompts: Tensor, response_ids: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """See `Passes.response_pass`."""
        n = soft_prompts.shape[1]
        flat = torch.tensor([token for ids in response_ids for token in ids], device=self._embed.weight.device)
        words = self._embed(flat).split([len(ids) for ids in response_ids])
        soft = soft_prompts.to(self._embed.weight.dtype)
        row = torch.cat([part for pair in zip(soft, words, strict=True) for part in pair])[None]
        lengths = [n + len(ids) for ids in response_ids]
        hidden = self._body(row, Segments.of(lengths), None)[0]
        # The last soft prompt predicts the first response token, the last response token predicts nothing.
        predicting = torch.cat(
            [
                torch.arange(end - length + n - 1, end - 1)
                for length, end in zip(lengths, accumulate(lengths), strict=True)
            ]
        )
        head = self._lm.get_output_embeddings()
        loss = linear_cross_entropy(hidden[predicting.to(hidden.device)], head.weight, flat, self._chunk)
        return loss, len(flat)

    @torch.no_grad()
    def _prefix_cache(self, query_ids: Sequence[Sequence[int]], shared: int) -> DynamicCache:
        # Without the config: a sliding-window cache layer would forget the first segments of the row.
        cache = DynamicCache()
        if shared:
            self._extend(cache, [query_ids[0][:shared]], 0)
        self._extend(cache, [ids[shared:] for ids in query_ids], shared)
        return cache

    def _extend(self, cache: DynamicCache, rows: Sequence[Sequence[int]], shared: int) -> None:
        flat = torch.tensor([token for ids in rows for token in ids], device=self._embed.weight.device)
        self._body(self._embed(flat)[None], Segments.of([len(ids) for ids in rows], shared=shared), cache)

    def _body(self, row: Tensor, segments: Segments, cache: DynamicCache | None) -> Tensor:
        with _attention(self._lm, _NAME):
            output = self._lm.get_decoder()(
                inputs_embeds=row,
                position_ids=segments.positions(row.device),
                past_key_values=cache,
                use_cache=cache is not None,
                packed=segments,
            )
        return output.last_hidden_state


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with (a chat template, an instruction), leaving each at least one of its own."""
    if len(rows) < 2:
        return 0
    first, last = min(map(list, rows)), max(map(list, rows))
    common = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(common, min(len(row) for row in rows) - 1)


def fast_passes(backbone: Any) -> Passes:
    """Packed passes, or with a warning the plain ones where the architecture cannot be packed."""
    try:
        return PackedPasses(backbone)
    except BackboneError as error:
        log.warning("%s; using the padded passes", error)
        return PlainPasses(backbone)


@contextlib.contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """Use an attention implementation inside the block only, so that the backbone generates as before outside it."""
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def _check_architecture(model: Any) -> None:
    """Compare the packed passes with the model's own forward on a few tokens."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(6, device=device) % model.config.get_text_config().vocab_size
    try:
        with _attention(model, _NAME):
            hidden = model.get_decoder()(
                input_ids=ids[None],
                position_ids=Segments.of([4, 2]).positions(device),
                use_cache=False,
                packed=Segments.of([4, 2]),
            ).last_hidden_state[0]
        expected = [model(input_ids=part[None], use_cache=False).logits[0] for part in (ids[:4], ids[4:])]
    except (TypeError, ValueError, AttributeError) as error:
        raise BackboneError(f"{type(model).__name__} cannot be packed ({error})") from None
    logits = F.linear(hidden, model.get_output_embeddings().weight)
    difference = float((logits - torch.cat(expected)).abs().max() / torch.cat(expected).abs().max())
    tolerance = 1e-3 if logits.dtype == torch.float32 else 0.1
    if difference > tolerance:
        raise BackboneError(
            f"packed passes of {type(model).__name__} differ from its own forward by {difference:.2g} "
            f"(limit {tolerance}): its attention or output head does more than this code knows"
        )
