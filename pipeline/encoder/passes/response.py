"""The response pass, composed of a layout (padded or packed) and a loss (the model's own head, or fused with it)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pipeline.backbone.output_head import at_least_float32, linear_cross_entropy, logit_transform
from pipeline.encoder.passes.activation_checkpointing import ContextFactory


@dataclass(frozen=True)
class ResponseBatch:
    """Soft prompts and responses, ready to run.

    Attributes:
        arguments: of the backbone's forward; `inputs_embeds` is `[rows, T, d]`.
        predicting: `[M]`, which of the `rows * T` positions predict a response token.
        labels: `[M]`, the tokens that they predict.
    """

    arguments: dict[str, Any]
    predicting: Tensor
    labels: Tensor


# Of soft prompts `[B, n, d]` and response ids.
Layout = Callable[[Tensor, Sequence[Sequence[int]]], ResponseBatch]
# Runs a batch through the backbone: the sum of its cross-entropy, a scalar.
ResponseLoss = Callable[[ResponseBatch], Tensor]


class LogitsLoss:
    """`ResponseLoss` through the model's own head, with the logits of all positions."""

    def __init__(self, backbone: Any) -> None:
        self._lm = backbone

    def __call__(self, batch: ResponseBatch) -> Tensor:
        logits = self._lm(**batch.arguments, use_cache=False).logits.flatten(0, 1)
        predictions = at_least_float32(logits.index_select(0, batch.predicting))
        return F.cross_entropy(predictions, batch.labels, reduction="sum")


class FusedLoss:
    """`ResponseLoss` at the predicting positions only, in chunks, without the model's own head."""

    def __init__(self, backbone: Any, chunk: int | None = None) -> None:
        """`chunk` rows have logits at a time; BackboneError if `logit_transform` cannot describe the head."""
        self._body, self._head = backbone.get_decoder(), backbone.get_output_embeddings()
        self._transform, self._chunk = logit_transform(backbone), chunk

    def __call__(self, batch: ResponseBatch) -> Tensor:
        hidden = self._body(**batch.arguments, use_cache=False).last_hidden_state.flatten(0, 1)
        return linear_cross_entropy(
            hidden.index_select(0, batch.predicting),
            self._head.weight,
            batch.labels,
            bias=self._head.bias,
            transform=self._transform,
            chunk=self._chunk,
        )


class ComposedResponsePass:
    """`ResponsePass` of a layout, a loss and a context."""

    def __init__(self, layout: Layout, loss: ResponseLoss, context: ContextFactory, *, padded: bool) -> None:
        """`context` is entered around the loss: the attention to use, layers to checkpoint."""
        self._layout, self._loss, self._context, self.padded = layout, loss, context, padded

    def __call__(self, soft_prompts: Tensor, response_ids: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        batch = self._layout(soft_prompts, response_ids)
        with self._context():
            return self._loss(batch), len(batch.labels)
