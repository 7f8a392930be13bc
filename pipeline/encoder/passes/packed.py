"""Passes without padding: a batch is one row of sequences that cannot see each other.

The frozen prefix of a query influences nothing that is trained, so it runs without autograd into a key-value cache, and
only the new tokens run with autograd. What all queries of a batch begin with runs once. Loss and gradients equal the
plain ones up to rounding.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pipeline.backbone.attention.registry import use_attention
from pipeline.backbone.attention.segments import Segments, shared_prefix
from pipeline.backbone.device import to_device
from pipeline.backbone.fused import FusedKernels
from pipeline.backbone.output_head import at_least_float32
from pipeline.encoder.passes.activation_checkpointing import ContextFactory
from pipeline.encoder.passes.plain import Pooled
from pipeline.encoder.passes.response import ComposedResponsePass, ResponseBatch, ResponseLoss

# Tokens that a forward pass of its own for the common beginning of a batch must save to pay: the pass launches every
# kernel of every layer once more, which on a GPU takes as long as some thousand tokens
# (computed from launches, not measured).
_LEAST_SAVED = {"cpu": 64, "cuda": 4000}


def least_saved(device: torch.device) -> int:
    """Tokens that reading the common beginning of a batch apart must save on this device."""
    return _LEAST_SAVED.get(device.type, _LEAST_SAVED["cuda"])


def packed_context(backbone: Any, attention: str, kernels: FusedKernels | None = None) -> ContextFactory:
    """Makes contexts in which the backbone runs with this attention of packed rows, and with these kernels."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with use_attention(backbone, attention), kernels() if kernels else contextlib.nullcontext():
            yield

    return context


class PackedBackbone:
    """A frozen backbone that reads packed rows: sequences side by side, without padding."""

    def __init__(self, backbone: Any, attention: str, kernels: FusedKernels | None = None) -> None:
        self._lm, self._context = backbone, packed_context(backbone, attention, kernels)
        self.embed = backbone.get_input_embeddings()

    def embedded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Input embeddings `[sum of lengths, d]` of token ids."""
        [ids] = to_device([_flat(rows)], self.embed.weight.device)
        return self.embed(ids)

    def hidden(self, row: Tensor, segments: Segments, cache: DynamicCache | None = None) -> Tensor:
        """Final-normed hidden states `[T, d]` of a packed row `[T, d]`, which is added to the cache."""
        with self._context():
            output = self._lm.get_decoder()(
                **packed_arguments(row, segments), past_key_values=cache, use_cache=cache is not None
            )
        return output.last_hidden_state[0]

    def read(
        self,
        rows: Sequence[Sequence[int]],
        tokens: Tensor,
        count: int,
        shared: int = 0,
        cache: DynamicCache | None = None,
        pooled: Pooled | None = None,
    ) -> Tensor:
        """Hidden states of the last `count` of the new `tokens` `[N, d]` after each row of ids, as `QueryPass` has it.

        `cache` holds `shared` tokens that all rows continue, and that no span of `pooled` holds.
        """
        states, lengths = self._run(rows, tokens, shared, cache)
        ends = torch.tensor(list(accumulate(lengths)), device=states.device)[:, None]
        hidden = at_least_float32(states[ends + torch.arange(-count, 0, device=states.device)])
        return pooled.in_front(hidden, packed_spans(states, lengths, pooled.spans, shared)) if pooled else hidden

    def read_all(
        self, rows: Sequence[Sequence[int]], tokens: Tensor, shared: int = 0, cache: DynamicCache | None = None
    ) -> Sequence[Tensor]:
        """Hidden states `[length + N, d]` of each row of ids and of the new `tokens` `[N, d]` after it; see `read`."""
        hidden, lengths = self._run(rows, tokens, shared, cache)
        return torch.split(at_least_float32(hidden), lengths)

    def _run(
        self, rows: Sequence[Sequence[int]], tokens: Tensor, shared: int, cache: DynamicCache | None
    ) -> tuple[Tensor, list[int]]:
        """Hidden states `[T, d]` of all rows side by side, and the length of each with its new tokens."""
        words = self.embedded(rows)
        row = interleave(torch.split(words, [len(ids) for ids in rows]), [tokens.to(words.dtype)] * len(rows))
        lengths = [len(ids) + len(tokens) for ids in rows]
        return self.hidden(row, Segments.of(lengths, shared=shared), cache), lengths


def packed_spans(states: Tensor, lengths: Sequence[int], spans: Sequence[slice], shared: int) -> list[Tensor]:
    """States at the span of each of the rows that lie side by side in `states` `[T, d]`, without `shared` tokens."""
    rows = torch.split(states, list(lengths))
    return [row[span.start - shared : span.stop - shared] for row, span in zip(rows, spans, strict=True)]


class _PackedCacheLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """Begins with its first states; transformers' own begins with empty tensors that are copied from the host."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True


def packed_cache() -> DynamicCache:
    """An empty cache of packed rows, every layer of which keeps all tokens.

    Made without the config: a sliding-window layer would forget the first sequences of a row.
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = _PackedCacheLayer
    return cache


def packed_arguments(row: Tensor, segments: Segments) -> dict[str, Any]:
    """Arguments of the backbone's decoder for a packed row of input embeddings `[T, d]`."""
    return {"inputs_embeds": row[None], "position_ids": segments.positions(row.device), "packed": segments}


def _flat(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([token for ids in rows for token in ids], dtype=torch.long)


def interleave(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """`[first[0], second[0], first[1], ...]` joined along the first dimension."""
    return torch.cat([part for pair in zip(first, second, strict=True) for part in pair])


class PackedQueryPass:
    """`QueryPass` in one row, with autograd through the queries: for a backbone that is trained."""

    padded = False

    def __init__(self, backbone: PackedBackbone) -> None:
        self._backbone = backbone

    def __call__(
        self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int, pooled: Pooled | None = None
    ) -> Tensor:
        return self._backbone.read(query_ids, tokens, read, pooled=pooled)


class FrozenPackedQueryPass:
    """`QueryPass` whose queries run without autograd into a cache, and whose new tokens run with it."""

    padded = False

    def __init__(self, backbone: PackedBackbone, *, share_prefix: bool = True) -> None:
        """`share_prefix`: the common beginning of a batch's queries, if any, runs once, in a forward of its own."""
        self._backbone, self._share_prefix = backbone, share_prefix

    def __call__(
        self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int, pooled: Pooled | None = None
    ) -> Tensor:
        rows, count = len(query_ids), len(tokens)
        spans = pooled.spans if pooled else ()
        shared = self._shared(query_ids, spans) if self._share_prefix else 0
        lengths = [len(ids) - shared for ids in query_ids]
        cache, queries = self._prefixes(query_ids, shared)
        new = tokens.to(self._backbone.embed.weight.dtype).repeat(rows, 1)
        states = self._backbone.hidden(new, Segments.of([count] * rows, lengths, shared), cache)
        hidden = at_least_float32(states.view(rows, count, -1)[:, -read:])
        return pooled.in_front(hidden, packed_spans(queries, lengths, spans, shared)) if pooled else hidden

    def _shared(self, query_ids: Sequence[Sequence[int]], spans: Sequence[slice]) -> int:
        """Tokens that the queries begin with and no span holds, if a pass of their own pays."""
        shared = min([shared_prefix(query_ids), *(span.start for span in spans)])
        least = least_saved(self._backbone.embed.weight.device)
        return shared if shared * (len(query_ids) - 1) >= least else 0

    @torch.no_grad()
    def _prefixes(self, query_ids: Sequence[Sequence[int]], shared: int) -> tuple[DynamicCache, Tensor]:
        """Keys and values of the queries, and hidden states `[T, d]` of what follows their shared beginning."""
        cache = packed_cache()
        if shared:
            self._extend(cache, [query_ids[0][:shared]], 0)
        return cache, self._extend(cache, [ids[shared:] for ids in query_ids], shared)

    def _extend(self, cache: DynamicCache, rows: Sequence[Sequence[int]], shared: int) -> Tensor:
        segments = Segments.of([len(ids) for ids in rows], shared=shared)
        return self._backbone.hidden(self._backbone.embedded(rows), segments, cache)


def packed_response_pass(backbone: Any, loss: ResponseLoss, context: ContextFactory) -> ComposedResponsePass:
    """The response pass over one packed row; `context` must set the attention."""
    return ComposedResponsePass(partial(_lay_out, backbone.get_input_embeddings()), loss, context, padded=False)


def _lay_out(embed: Any, soft_prompts: Tensor, response_ids: Sequence[Sequence[int]]) -> ResponseBatch:
    lengths = [len(ids) for ids in response_ids]
    soft = soft_prompts.to(embed.weight.dtype)
    n = soft.shape[1]
    # The last soft prompt predicts the first response token, the last response token predicts nothing.
    ends = accumulate(n + length for length in lengths)
    positions = torch.cat([torch.arange(end - length - 1, end - 1) for length, end in zip(lengths, ends, strict=True)])
    labels, predicting = to_device([_flat(response_ids), positions], embed.weight.device)
    row = interleave(soft.unbind(), embed(labels).split(lengths))
    return ResponseBatch(packed_arguments(row, Segments.of([n + length for length in lengths])), predicting, labels)
