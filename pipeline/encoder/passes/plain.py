"""The two passes through the frozen backbone, plain: padded batches, full logits. The reference of faster passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.backbone.device import sent
from pipeline.backbone.loading import Pool
from pipeline.backbone.output_head import at_least_float32
from pipeline.backbone.prompting import FormattedPrompt, pad_left, pad_right


@dataclass(frozen=True)
class Pooled:
    """Tokens whose mean state an embedding is made of, where that is not the mean over the compression tokens.

    Attributes:
        spans: tokens of each query, at least one.
        with_tokens: and the new tokens that are read.
    """

    spans: Sequence[slice]
    with_tokens: bool

    def take(self, rows: Sequence[int]) -> "Pooled":
        """Of these queries."""
        return Pooled([self.spans[row] for row in rows], self.with_tokens)

    def in_front(self, hidden: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Hidden states `[B, read, d]` at new tokens behind the mean `[d]` of each row, as `[B, 1 + read, d]`.

        `states` are those at the tokens of each row's span, `[length, d]`.
        """
        sums = torch.stack([at_least_float32(row).sum(0) for row in states])
        more = hidden.shape[1] if self.with_tokens else 0
        counts = sent(torch.tensor([[len(row) + more] for row in states]), hidden.device)
        if self.with_tokens:
            sums = sums + hidden.sum(1)
        return torch.cat([(sums / counts)[:, None], hidden], dim=1)


def pooled_of(prompts: Sequence[FormattedPrompt], pool: Pool) -> Pooled | None:
    """What `pool` takes of prompts of the template `echo`; None: the compression tokens, of any template."""
    if pool == "tokens":
        return None
    return Pooled([prompt.second for prompt in prompts if prompt.second], with_tokens=pool == "both")


class QueryPass(Protocol):
    """Queries in, hidden states at the new tokens out.

    `padded`: every row of a batch costs as many tokens as the longest, so similar lengths should meet.
    """

    @property
    def padded(self) -> bool: ...

    def __call__(
        self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int, pooled: Pooled | None = None
    ) -> Tensor:
        """Final-normed hidden states `[B, read, d]` of the last `read` new tokens, in float32 or better.

        The rows of the new `tokens` `[N, d]` follow each query; gradients flow into them. With `pooled`, a mean stands
        in front of them, `[B, 1 + read, d]`.
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

    def __call__(
        self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int, pooled: Pooled | None = None
    ) -> Tensor:
        ids, mask = (tensor.to(self._embed.weight.device) for tensor in pad_left(query_ids))
        new = tokens.to(self._embed.weight.dtype).expand(len(query_ids), -1, -1)
        embeds = torch.cat([self._embed(ids), new], dim=1)
        mask = torch.cat([mask, mask.new_ones(new.shape[:2])], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        body = self._lm.get_decoder()
        output = body(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        hidden = at_least_float32(output.last_hidden_state[:, -read:])
        if pooled is None:
            return hidden
        queries = output.last_hidden_state[:, : ids.shape[1]]
        return pooled.in_front(hidden, padded_spans(queries, query_ids, pooled.spans))


def padded_spans(states: Tensor, rows: Sequence[Sequence[int]], spans: Sequence[slice]) -> list[Tensor]:
    """States at the span of each row; `states` `[B, T, d]` are padded on the left."""
    starts = [states.shape[1] - len(row) for row in rows]
    return [
        state[start + span.start : start + span.stop] for state, start, span in zip(states, starts, spans, strict=True)
    ]


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
