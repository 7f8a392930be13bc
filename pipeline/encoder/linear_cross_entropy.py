"""Cross-entropy through a frozen output head without ever holding all logits."""

from typing import Any

import torch
from torch import Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and the gradient to the hidden states in one sweep over chunks; the head gets no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logits = (hidden[rows] @ weight.T).float()
            picked = labels[rows, None]
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += (normaliser - logits.gather(1, picked)).sum()
            logits.sub_(normaliser).exp_()
            logits.scatter_add_(1, picked, logits.new_full((), -1.0).expand_as(picked))
            gradient[rows] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 256) -> Tensor:
    """Sum over rows of the cross-entropy of `softmax(hidden @ weight.T)` against `labels`, float32.

    Args:
        hidden: `[M, d]`, gets a gradient.
        weight: `[V, d]` of the frozen head, gets none.
        labels: `[M]` token ids.
        chunk: rows whose `[chunk, V]` logits exist at a time.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk)  # type: ignore[no-untyped-call]
