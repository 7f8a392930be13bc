"""Passes without padding: a batch is one row of sequences that cannot see each other.

The frozen prefix of a query influences nothing that is trained, so it runs without autograd into a key-value cache, and
only the new tokens run with autograd against it. What all queries of a batch begin with (a chat template, an
instruction) runs once. Loss and gradients equal the plain ones up to rounding.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.backbone.attention.registry import use_attention
from pipeline.backbone.attention.segments import Segments, shared_prefix
from pipeline.backbone.output_head import at_least_float32
from pipeline.encoder.passes.activation_checkpointing import ContextFactory
from pipeline.encoder.passes.response import ComposedResponsePass, ResponseBatch, ResponseLoss


class PackedBackbone:
    """A causal LM that runs packed rows with one attention."""

    def __init__(self, backbone: Any, attention: str) -> None:
        self._lm, self._attention = backbone, attention
        self.embed = backbone.get_input_embeddings()

    def embedded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Input embeddings `[sum of lengths, d]` of token ids."""
        return self.embed(flat(rows, self.embed.weight.device))

    def hidden(self, row: Tensor, segments: Segments, cache: DynamicCache | None = None) -> Tensor:
        """Final-normed hidden states `[T, d]` of a packed row `[T, d]`, which is added to the cache."""
        with use_attention(self._lm, self._attention):
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
    ) -> Tensor:
        """Hidden states `[B, count, d]` of the last `count` of the new `tokens` `[N, d]` behind each row of ids.

        `cache` holds `shared` tokens that all rows go on from.
        """
        words = self.embedded(rows)
        row = interleave(torch.split(words, [len(ids) for ids in rows]), [tokens.to(words.dtype)] * len(rows))
        lengths = [len(ids) + len(tokens) for ids in rows]
        hidden = self.hidden(row, Segments.of(lengths, shared=shared), cache)
        ends = torch.tensor(list(accumulate(lengths)), device=row.device)[:, None]
        return at_least_float32(hidden[ends + torch.arange(-count, 0, device=row.device)])


def packed_arguments(row: Tensor, segments: Segments) -> dict[str, Any]:
    """Arguments of the backbone's forward for a packed row `[T, d]`."""
    return {"inputs_embeds": row[None], "position_ids": segments.positions(row.device), "packed": segments}


def flat(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """All ids one after another, int64."""
    return torch.tensor([token for ids in rows for token in ids], dtype=torch.long, device=device)


def interleave(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """`[first[0], second[0], first[1], ...]` joined along the first dimension."""
    return torch.cat([part for pair in zip(first, second, strict=True) for part in pair])


class PackedQueryPass:
    """`QueryPass` in one row, with autograd through the queries: for a backbone that is trained."""

    padded = False

    def __init__(self, backbone: PackedBackbone) -> None:
        self._backbone = backbone

    def __call__(self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int) -> Tensor:
        """See `QueryPass`."""
        return self._backbone.read(query_ids, tokens, read)


class FrozenPackedQueryPass:
    """`QueryPass` whose queries run without autograd into a cache, and whose new tokens run with it."""

    padded = False

    def __init__(self, backbone: PackedBackbone, *, share_prefix: bool = True) -> None:
        """`share_prefix`: the common beginning of a batch's queries, if any, runs once, in a forward of its own."""
        self._backbone, self._share_prefix = backbone, share_prefix

    def __call__(self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int) -> Tensor:
        """See `QueryPass`."""
        rows, count = len(query_ids), len(tokens)
        shared = shared_prefix(query_ids) if self._share_prefix else 0
        cache = self._prefixes(query_ids, shared)
        new = tokens.to(self._backbone.embed.weight.dtype).repeat(rows, 1)
        segments = Segments.of([count] * rows, [len(ids) - shared for ids in query_ids], shared)
        hidden = self._backbone.hidden(new, segments, cache)
        return at_least_float32(hidden.view(rows, count, -1)[:, -read:])

    @torch.no_grad()
    def _prefixes(self, query_ids: Sequence[Sequence[int]], shared: int) -> DynamicCache:
        # Without the config: a sliding-window cache layer would forget the first sequences of the row.
        cache = DynamicCache()
        if shared:
            self._extend(cache, [query_ids[0][:shared]], 0)
        self._extend(cache, [ids[shared:] for ids in query_ids], shared)
        return cache

    def _extend(self, cache: DynamicCache, rows: Sequence[Sequence[int]], shared: int) -> None:
        segments = Segments.of([len(ids) for ids in rows], shared=shared)
        self._backbone.hidden(self._backbone.embedded(rows), segments, cache)


def packed_response_pass(backbone: Any, loss: ResponseLoss, context: ContextFactory) -> ComposedResponsePass:
    """The response pass over one packed row; `context` must set the attention."""
    return ComposedResponsePass(partial(_lay_out, backbone.get_input_embeddings()), loss, context, padded=False)


def _lay_out(embed: Any, soft_prompts: Tensor, response_ids: Sequence[Sequence[int]]) -> ResponseBatch:
    labels = flat(response_ids, embed.weight.device)
    lengths = [len(ids) for ids in response_ids]
    soft = soft_prompts.to(embed.weight.dtype)
    n = soft.shape[1]
    row = interleave(soft.unbind(), embed(labels).split(lengths))
    # The last soft prompt predicts the first response token, the last response token predicts nothing.
    ends = accumulate(n + length for length in lengths)
    predicting = [torch.arange(end - length - 1, end - 1) for length, end in zip(lengths, ends, strict=True)]
    arguments = packed_arguments(row, Segments.of([n + length for length in lengths]))
    return ResponseBatch(arguments, torch.cat(predicting).to(row.device), labels)
