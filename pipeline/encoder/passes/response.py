"""From the arguments of a forward pass to the summed cross-entropy: through the model's own head, or fused with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from pipeline.backbone.output_head import at_least_float32, linear_cross_entropy, logit_shape
from pipeline.encoder.passes.activation_checkpointing import Surroundings


@dataclass(frozen=True)
class LaidOut:
    """Soft prompts and responses, ready to run.

    Attributes:
        arguments: of the backbone's forward; `inputs_embeds` is `[rows, T, d]`.
        predicting: `[M]`, which of the `rows * T` positions predict a response token.
        labels: `[M]`, the tokens that they predict.
    """

    arguments: dict[str, Any]
    predicting: Tensor
    labels: Tensor


class ResponseLoss(Protocol):
    """Runs laid out responses through the backbone: the sum of their cross-entropy, a scalar."""

    def __call__(self, laid_out: LaidOut) -> Tensor:
        """The loss of one batch."""
        ...


class LogitsLoss:
    """Through the model's own head, whatever it does: the logits of all positions exist at once."""

    def __init__(self, backbone: Any) -> None:
        """`backbone` is a causal LM."""
        self._lm = backbone

    def __call__(self, laid_out: LaidOut) -> Tensor:
        """See `ResponseLoss`."""
        logits = self._lm(**laid_out.arguments, use_cache=False).logits.flatten(0, 1)
        predictions = at_least_float32(logits.index_select(0, laid_out.predicting))
        return F.cross_entropy(predictions, laid_out.labels, reduction="sum")


class FusedLoss:
    """At the predicting positions only, in chunks, without the model's own head."""

    def __init__(self, backbone: Any, chunk: int | None = None) -> None:
        """Args: backbone: a causal LM; chunk: rows whose logits exist at a time, None chooses.

        Raises:
            BackboneError: its head is trained, quantised, or does more than `LogitShape` says.
        """
        self._body, self._head = backbone.get_decoder(), backbone.get_output_embeddings()
        self._shape, self._chunk = logit_shape(backbone), chunk

    def __call__(self, laid_out: LaidOut) -> Tensor:
        """See `ResponseLoss`."""
        hidden = self._body(**laid_out.arguments, use_cache=False).last_hidden_state.flatten(0, 1)
        return linear_cross_entropy(
            hidden.index_select(0, laid_out.predicting),
            self._head.weight,
            laid_out.labels,
            bias=self._head.bias,
            shape=self._shape,
            chunk=self._chunk,
        )


# The response pass, put together: a layout (padded or packed), a loss (own head or fused), and what surrounds them.

Layout = Callable[[Tensor, Sequence[Sequence[int]]], LaidOut]


class Responses:
    """`ResponsePass` of its parts."""

    def __init__(self, layout: Layout, loss: ResponseLoss, surroundings: Surroundings, *, padded: bool) -> None:
        """From its parts.

        Args:
            layout: of soft prompts `[B, n, d]` and response ids.
            loss: runs what is laid out.
            surroundings: entered around the run: the attention to use, layers to compute again.
            padded: see `QueryPass`.
        """
        self._layout, self._loss, self._surroundings, self.padded = layout, loss, surroundings, padded

    def response_pass(self, soft_prompts: Tensor, response_ids: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
        """See `ResponsePass.response_pass`."""
        laid_out = self._layout(soft_prompts, response_ids)
        with self._surroundings():
            return self._loss(laid_out), len(laid_out.labels)
