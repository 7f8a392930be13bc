"""The two passes through the frozen backbone, plain: padded batches, full logits. The reference of faster passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.backbone.output_head import at_least_float32
from pipeline.backbone.prompting import pad_left, pad_right


class QueryPass(Protocol):
    """Queries in, hidden states at the new tokens out.

    `padded`: every row of a batch costs as many tokens as the longest, so similar lengths should meet.
    """

    @property
    def padded(self) -> bool: ...

    def __call__(self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int) -> Tensor:
        """Final-normed hidden states `[B, read, d]` of the last `read` new tokens, in float32 or better.

        The rows of the new `tokens` `[N, d]` follow each query; gradients flow into them.
        """
        ...


class ResponsePass(Protocol):
    """Soft prompts and responses in, cross-entropy out."""

    @property
    def padded(self) -> bool: ...

    def __call__(self, soft_prompts: Tensor, response_ids: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """Cross-entropy of the responses (EOS included where there is one) given only the soft prompts.

        Gradients flow into the soft prompts `[B, n, d]`.

        Returns:
            The sum over all response tokens (a scalar in float32 or better), and the number of these tokens.
        """
        ...


@dataclass
class Passes:
    """How a batch runs through the backbone.

    Attributes:
        queries_together: a query pass keeps little of a row for backward, so one may serve several response passes.
    """

    query_pass: QueryPass
    response_pass: ResponsePass
    queries_together: bool = False

    @property
    def padded(self) -> bool:
        return self.query_pass.padded or self.response_pass.padded


def plain_passes(backbone: Any) -> Passes:
    """Both passes as the paper writes them down, for any frozen causal LM of transformers in eval mode."""
    return Passes(PlainQueryPass(backbone), PlainResponsePass(backbone))


class PlainQueryPass:
    """`QueryPass` with autograd through the whole query."""

    padded = True

    def __init__(self, backbone: Any) -> None:
        self._lm, self._embed = backbone, backbone.get_input_embeddings()

    def __call__(self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int) -> Tensor:
        ids, mask = (tensor.to(self._embed.weight.device) for tensor in pad_left(query_ids))
        new = tokens.to(self._embed.weight.dtype).expand(len(query_ids), -1, -1)
        embeds = torch.cat([self._embed(ids), new], dim=1)
        mask = torch.cat([mask, mask.new_ones(new.shape[:2])], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        body = self._lm.get_decoder()
        output = body(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        return at_least_float32(output.last_hidden_state[:, -read:])


class PlainResponsePass:
    """`ResponsePass` that makes the logits of all positions."""

    padded = True

    def __init__(self, backbone: Any) -> None:
        self._lm, self._embed = backbone, backbone.get_input_embeddings()

    def __call__(self, soft_prompts: Tensor, response_ids: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        ids, mask = (tensor.to(self._embed.weight.device) for tensor in pad_right(response_ids))
        soft = soft_prompts.to(self._embed.weight.dtype)
        embeds = torch.cat([soft, self._embed(ids)], dim=1)
        full_mask = torch.cat([mask.new_ones(soft.shape[:2]), mask], dim=1)
        logits = self._lm(inputs_embeds=embeds, attention_mask=full_mask, use_cache=False).logits
        # The last soft prompt predicts the first response token.
        predictions = at_least_float32(logits[:, soft.shape[1] - 1 : -1])
        labels = ids.masked_fill(mask == 0, -100)
        loss = F.cross_entropy(predictions.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return loss, int(mask.sum())
