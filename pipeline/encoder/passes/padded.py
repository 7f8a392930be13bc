"""Padded batches with a frozen prefix: for every architecture with a key-value cache.

Queries are padded on the left, so that the new tokens of all rows align after the cache (sliding windows count from the
end); responses on the right, where causality alone hides the padding.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.backbone.output_head import at_least_float32
from pipeline.backbone.prompting import pad_left, pad_right
from pipeline.encoder.passes.activation_checkpointing import ContextFactory
from pipeline.encoder.passes.plain import Pooled, padded_spans
from pipeline.encoder.passes.response import ComposedResponsePass, ResponseBatch, ResponseLoss


class FrozenPaddedQueryPass:
    """`QueryPass` whose queries run without autograd into a cache, and whose new tokens run with it."""

    padded = True

    def __init__(self, backbone: Any) -> None:
        self._lm, self._embed = backbone, backbone.get_input_embeddings()

    def __call__(
        self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int, pooled: Pooled | None = None
    ) -> Tensor:
        ids, mask = (tensor.to(self._embed.weight.device) for tensor in pad_left(query_ids))
        cache, queries = self._prefix(ids, mask)
        new = tokens.to(self._embed.weight.dtype).expand(len(ids), -1, -1)
        output = self._lm.get_decoder()(
            inputs_embeds=new,
            attention_mask=torch.cat([mask, mask.new_ones(new.shape[:2])], dim=1),
            position_ids=mask.sum(1, keepdim=True) + torch.arange(len(tokens), device=mask.device),
            past_key_values=cache,
            use_cache=True,
        )
        hidden = at_least_float32(output.last_hidden_state[:, -read:])
        return pooled.in_front(hidden, padded_spans(queries, query_ids, pooled.spans)) if pooled else hidden

    @torch.no_grad()
    def _prefix(self, ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
        """Keys and values of the queries, and their final-normed hidden states `[B, T, d]`."""
        cache = DynamicCache(config=self._lm.get_decoder().config)
        output = self._lm.get_decoder()(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return cache, output.last_hidden_state


def padded_response_pass(backbone: Any, loss: ResponseLoss, context: ContextFactory) -> ComposedResponsePass:
    """The response pass over rows padded on the right."""
    return ComposedResponsePass(partial(_lay_out, backbone.get_input_embeddings()), loss, context, padded=True)


def _lay_out(embed: Any, soft_prompts: Tensor, response_ids: Sequence[Sequence[int]]) -> ResponseBatch:
    ids, mask = (tensor.to(embed.weight.device) for tensor in pad_right(response_ids))
    soft = soft_prompts.to(embed.weight.dtype)
    rows, n = soft.shape[:2]
    width = n + ids.shape[1]
    arguments = {
        "inputs_embeds": torch.cat([soft, embed(ids)], dim=1),
        "attention_mask": torch.cat([mask.new_ones(rows, n), mask], dim=1),
    }
    # The last soft prompt predicts the first response token.
    before = torch.arange(rows * width, device=ids.device).view(rows, width)[:, n - 1 : -1]
    return ResponseBatch(arguments, before[mask == 1], ids[mask == 1])
