"""The frozen output head: from hidden states to logits, and cross-entropy that never holds all logits."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.errors import BackboneError

# Bytes of the float32 logits of one chunk; at its peak a chunk takes twice that.
_CHUNK_BYTES = {"cpu": 12 * 2**20, "cuda": 256 * 2**20}
# Rows of the head multiplied at a time: CPU libraries copy what they multiply into a layout of their own.
_CPU_BLOCK = 8192


def at_least_float32(values: Tensor) -> Tensor:
    """`values` in float32 or their own higher precision, for sums."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True)
class LogitTransform:
    """From a head's projection to its logits: `cap(scale * projection)`, with `cap(x) = softcap * tanh(x / softcap)`.

    `scale` is not 1 in Granite, Cohere and others; Gemma has a `softcap`.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, projection: Tensor) -> Tensor | None:
        """Turn a projection into logits, in place; returns the tanh of capped ones, for the gradient."""
        if self.scale != 1.0:
            projection.mul_(self.scale)
        if self.softcap is None:
            return None
        tanh = torch.tanh(projection / self.softcap)
        torch.mul(tanh, self.softcap, out=projection)
        return tanh


def logit_transform(backbone: Any) -> LogitTransform:
    """The transform of a causal LM's head, read from its config and verified on a few tokens.

    Raises:
        BackboneError: the head is trained, quantised or computes something else.
    """
    name, head = type(backbone).__name__, backbone.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise BackboneError(f"the head of {name} is a {type(head).__name__}, not a plain projection")
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise BackboneError(f"the head of {name} is trained")
    transform = configured_transform(backbone.config.get_text_config())
    difference = _difference(backbone, head, transform)
    tolerance = 0.02 if backbone.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not difference <= tolerance:
        raise BackboneError(
            f"the head of {name} does more than this code knows: its logits differ from {transform} "
            f"by {difference:.2g} of the largest (limit {tolerance})"
        )
    return transform


def configured_transform(config: Any) -> LogitTransform:
    """The transform that a text config names."""
    # Granite divides, Cohere and Falcon-H1 multiply.
    scale = (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    return LogitTransform(
        scale / (getattr(config, "logits_scaling", None) or 1.0), getattr(config, "final_logit_softcapping", None)
    )


@torch.no_grad()
def _difference(backbone: Any, head: nn.Linear, transform: LogitTransform) -> float:
    """Largest difference between the described logits and the model's own, relative to its largest logit."""
    ids = torch.arange(1, 9, device=head.weight.device)[None] % len(head.weight)
    own = at_least_float32(backbone(input_ids=ids, use_cache=False).logits)
    hidden = backbone.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    described = at_least_float32(F.linear(hidden, head.weight, head.bias))
    transform.apply_(described)
    return float((described - own).abs().max() / own.abs().max())


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose logits fit the memory that a chunk may take on this device."""
    rows = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // (4 * vocabulary)
    # A GPU multiplies whole tiles of 128 rows.
    return max(16, rows) if device.type == "cpu" else max(128, rows - rows % 128)


def _blocks(weight: Tensor) -> list[slice]:
    rows = _CPU_BLOCK if weight.device.type == "cpu" else len(weight)
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`[rows, V]` at the start of `out`: the head's projection of `[rows, d]`, by blocks of the vocabulary."""
    logits = out[: len(hidden)]
    for block in _blocks(weight):
        logits[:, block] = F.linear(hidden, weight[block], None if bias is None else bias[block])
    return logits


def _project_back(gradient: Tensor, weight: Tensor) -> Tensor:
    """`[rows, d]`: the gradient of `[rows, V]` logits to the hidden states, blocks summed in float32."""
    first, *others = _blocks(weight)
    total = at_least_float32(gradient[:, first].to(weight.dtype) @ weight[first])
    for block in others:
        total += gradient[:, block].to(weight.dtype) @ weight[block]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and the gradient to the hidden states in one sweep over chunks; the head gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        chunk: int,
    ) -> Tensor:
        total = at_least_float32(hidden.new_zeros(()))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        buffer = total.new_empty(min(chunk, len(labels)), len(weight))
        for start in range(0, len(labels), chunk):
            rows = slice(start, start + chunk)
            logits = _project(hidden[rows], weight, bias, buffer)
            tanh = transform.apply_(logits)
            picked = labels[rows, None]
            at_labels = logits.gather(1, picked)
            # In place, one buffer from logits to softmax to gradient.
            top = logits.amax(-1, keepdim=True)
            mass = logits.sub_(top).exp_().sum(-1, keepdim=True)
            total += (mass.log() + top - at_labels).sum()
            if gradient is not None:
                logits.div_(mass).scatter_add_(1, picked, torch.full_like(at_labels, -1.0))
                if tanh is not None:
                    logits.mul_(tanh.square_().neg_().add_(1.0))
                gradient[rows] = _project_back(logits, weight)
        ctx.save_for_backward(gradient)
        ctx.scale = transform.scale
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream * ctx.scale).to(gradient.dtype), None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),  # frozen
    chunk: int | None = None,
) -> Tensor:
    """Sum over rows of the cross-entropy of a frozen head's logits against `labels` `[M]`, in float32 or better.

    `hidden` `[M, d]` gets a gradient, `weight` `[V, d]` and `bias` `[V]` get none. `chunk` rows have logits at a time;
    None chooses by the vocabulary.
    """
    rows = chunk or chunk_rows(len(weight), hidden.device)
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, transform, rows)  # type: ignore[no-untyped-call]
