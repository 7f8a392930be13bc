"""From the arguments of a forward pass to the summed cross-entropy: through the model's own head, or fused with it."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.encoder.linear_cross_entropy import LogitShape, linear_cross_entropy
from pipeline.encoder.precision import at_least_float32
from pipeline.errors import BackboneError


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


def logit_shape(backbone: Any) -> LogitShape:
    """What the head of a causal LM does, read from its config and verified on a few tokens.

    Raises:
        BackboneError: it cannot be described.
    """
    name, head = type(backbone).__name__, backbone.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise BackboneError(f"the head of {name} is a {type(head).__name__}, not a plain projection")
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise BackboneError(f"the head of {name} is trained")
    shape = _configured(backbone.config.get_text_config())
    difference = _difference(backbone, head, shape)
    tolerance = 0.02 if backbone.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not difference <= tolerance:
        raise BackboneError(
            f"the head of {name} does more than this code knows: its logits differ from {shape} "
            f"by {difference:.2g} of the largest (limit {tolerance})"
        )
    return shape


def _configured(config: Any) -> LogitShape:
    # Granite divides, Cohere and Falcon-H1 multiply.
    scale = (getattr(config, "logit_scale", None) or 1.0) * (getattr(config, "lm_head_multiplier", None) or 1.0)
    return LogitShape(
        scale / (getattr(config, "logits_scaling", None) or 1.0), getattr(config, "final_logit_softcapping", None)
    )


@torch.no_grad()
def _difference(backbone: Any, head: nn.Linear, shape: LogitShape) -> float:
    """Largest difference between the described logits and the model's own, relative to its largest logit."""
    ids = torch.arange(1, 9, device=head.weight.device)[None] % len(head.weight)
    own = at_least_float32(backbone(input_ids=ids, use_cache=False).logits)
    hidden = backbone.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    described = at_least_float32(F.linear(hidden, head.weight, head.bias))
    shape.apply_(described)
    return float((described - own).abs().max() / own.abs().max())
