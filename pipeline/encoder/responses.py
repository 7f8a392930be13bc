"""The response pass, put together: a layout (padded or packed), a loss (own head or fused), and what surrounds them."""

from collections.abc import Callable, Sequence

from torch import Tensor

from pipeline.encoder.heads import LaidOut, ResponseLoss
from pipeline.encoder.recomputation import Surroundings

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
