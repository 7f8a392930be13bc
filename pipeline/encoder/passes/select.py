"""Each fast path is a switch; what the backbone cannot do falls back, with a warning, to what it can.

    packed                one row without padding (else: padded batches)
    frozen_prefix         queries run without autograd into a cache (else: autograd through the whole query)
    fused_cross_entropy   chunked, at response positions only (else: all logits)
    checkpoint_responses  layers of the response pass keep their inputs only and run again in the backward pass

With all of them off the passes are `PlainPasses`, and every combination equals those in loss and gradients up to
rounding. What is built is compared with them on a few tokens before it is used.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.backbone.attention.registry import (
    Attention,
    Implementation,
    check_layers,
    choose_attention,
    use_attention,
)
from pipeline.backbone.attention.segments import Segments
from pipeline.core.errors import BackboneError
from pipeline.encoder.passes.activation_checkpointing import Surroundings, recomputable_layers, recomputed
from pipeline.encoder.passes.packed import FrozenPackedQueries, PackedBackbone, PackedQueries, packed_responses
from pipeline.encoder.passes.padded import FrozenPaddedQueries, padded_responses
from pipeline.encoder.passes.plain import PairedPasses, Passes, PlainPasses, QueryPass, ResponsePass
from pipeline.encoder.passes.response import FusedLoss, LogitsLoss, ResponseLoss

log = logging.getLogger(__name__)

P = TypeVar("P")
# What a library raises where an architecture does not fit.
MISFITS = (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError)
# Largest relative differences of values and of gradients from the plain ones. Deep models amplify rounding, in half
# precision to a good part of a gradient: there only one that is cut off (1.0) can be told from an honest one.
LIMITS = (1e-3, 0.05)
HALF_LIMITS = (0.1, 0.99)


def fast_passes(backbone: Any) -> Passes:
    """The fastest passes that the backbone can do."""
    return make_passes(backbone)


def make_passes(
    backbone: Any,
    *,
    packed: bool = True,
    frozen_prefix: bool = True,
    fused_cross_entropy: bool = True,
    checkpoint_responses: bool = False,
    attention: Attention = "auto",
    chunk: int | None = None,
    share_prefix: bool = True,
) -> Passes:
    """Passes with these switches on, as far as the backbone can.

    Args:
        backbone: a causal LM in eval mode; if parts of it are trained, no prefix is frozen.
        packed: see the module, as for the next three.
        frozen_prefix: see the module.
        fused_cross_entropy: see the module.
        checkpoint_responses: see the module.
        attention: how packed rows attend; `auto` chooses and says why.
        chunk: response positions whose logits exist at a time; None chooses by the vocabulary.
        share_prefix: run what all queries of a batch begin with once; off where all processes must run the same number
            of forward passes.

    Raises:
        BackboneError: `attention` names what cannot run here, or no layer can be checkpointed.
    """
    plain = PlainPasses(backbone)
    if not (packed or frozen_prefix or fused_cross_entropy or checkpoint_responses):
        return plain
    check = _Check(backbone, plain)
    frozen_prefix = frozen_prefix and _is_frozen(backbone)
    attentions = packed_attentions(backbone, attention) if packed else []
    loss = _fused_loss(backbone, chunk) if fused_cross_entropy else None
    layers = recomputable_layers(backbone) if checkpoint_responses else None
    queries = first_equal(_query_passes(backbone, attentions, frozen_prefix, share_prefix), check.queries)
    responses = first_equal(_response_passes(backbone, attentions, loss, layers), check.responses)
    return PairedPasses(queries or plain, responses or plain) if queries or responses else plain


class _Check:
    """Compares passes with the plain ones on a few tokens: what they compute, and its gradients."""

    def __init__(self, backbone: Any, plain: PlainPasses) -> None:
        """Raises BackboneError if the backbone cannot even run the plain ones."""
        self._embed = backbone.get_input_embeddings()
        self._limits = HALF_LIMITS if backbone.dtype in (torch.bfloat16, torch.float16) else LIMITS
        begin, *rest = (self._words(number, length) for number, length in enumerate((3, 9, 2, 14)))
        self._query_ids = [begin + words for words in rest]
        self._response_ids = [self._words(number, length) for number, length in enumerate((6, 1, 11), start=4)]
        try:
            self._queries, self._responses = self._query_values(plain), self._response_values(plain)
        except MISFITS as error:
            raise BackboneError(f"{type(backbone).__name__} cannot run on input embeddings: {error}") from None

    def queries(self, candidate: QueryPass) -> str | None:
        """What is wrong with a query pass, if anything."""
        return self._obstacle(lambda: self._query_values(candidate), self._queries)

    def responses(self, candidate: ResponsePass) -> str | None:
        """What is wrong with a response pass, if anything."""
        return self._obstacle(lambda: self._response_values(candidate), self._responses)

    def _obstacle(self, compute: Callable[[], list[Tensor]], expected: list[Tensor]) -> str | None:
        try:
            found = compute()
        except MISFITS as error:
            return str(error).strip().split("\n")[0]
        for what, limit, value, right in zip(("values", "gradients"), self._limits, found, expected, strict=True):
            difference = float((value - right).norm() / right.norm())
            if not difference <= limit:
                return f"its {what} differ from the plain ones by {difference:.2g} (limit {limit})"
        return None

    def _query_values(self, queries: QueryPass) -> list[Tensor]:
        tokens = self._rows(self._words(8, 3))
        hidden = queries.query_pass(self._query_ids, tokens, 2)
        weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
        return [hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), tokens)]

    def _response_values(self, responses: ResponsePass) -> list[Tensor]:
        soft_prompts = self._rows(self._words(9, 6)).view(3, 2, -1)
        loss, _ = responses.response_pass(soft_prompts, self._response_ids)
        return [loss.detach(), *torch.autograd.grad(loss, soft_prompts)]

    def _words(self, number: int, length: int) -> list[int]:
        """Token ids from all over the vocabulary but its beginning, where special tokens are."""
        vocabulary = len(self._embed.weight)
        first = vocabulary // 50
        return [first + 7919 * (100 * number + place) % (vocabulary - first) for place in range(length)]

    def _rows(self, ids: list[int]) -> Tensor:
        return self._embed(torch.tensor(ids, device=self._embed.weight.device)).detach().requires_grad_()


def _is_frozen(backbone: Any) -> bool:
    frozen = not any(parameter.requires_grad for parameter in backbone.parameters())
    if not frozen:
        log.info("train.passes: parts of the backbone are trained, so no prefix is frozen")
    return frozen


def packed_attentions(backbone: Any, requested: Attention) -> list[Implementation]:
    """Attentions of packed rows, the best first; none where the architecture cannot be packed."""
    chosen, reason = choose_attention(backbone, requested)
    try:
        check_layers(backbone, partial(_run_packed, backbone))
    except BackboneError as error:
        log.warning("%s; its batches are padded", error)
        return []
    log.info("train.passes: packed rows attend with %s: %s", chosen, reason)
    return [chosen, "segments"] if requested == "auto" and chosen != "segments" else [chosen]


def _run_packed(backbone: Any, attention: str) -> None:
    rows = PackedBackbone(backbone, attention)
    try:
        with torch.no_grad():
            rows.hidden(rows.words([[1, 2, 3], [4]]), Segments.of([3, 1]))
    except MISFITS as error:
        raise BackboneError(f"{type(backbone).__name__} cannot be packed ({error})") from None


def _fused_loss(backbone: Any, chunk: int | None) -> ResponseLoss | None:
    try:
        return FusedLoss(backbone, chunk)
    except BackboneError as error:
        log.warning("%s; all its logits are made at once", error)
        return None


def _query_passes(
    backbone: Any, attentions: list[Implementation], frozen_prefix: bool, share_prefix: bool
) -> Iterator[tuple[str, QueryPass]]:
    """Query passes to try, and what to call them."""
    for attention in attentions:
        rows = PackedBackbone(backbone, attention)
        packed = FrozenPackedQueries(rows, share_prefix=share_prefix) if frozen_prefix else PackedQueries(rows)
        yield f"the packed query pass with {attention} attention", packed
    if frozen_prefix:
        yield "the query pass with a frozen prefix", FrozenPaddedQueries(backbone)


def _response_passes(
    backbone: Any, attentions: list[Implementation], loss: ResponseLoss | None, layers: list[Any] | None
) -> Iterator[tuple[str, ResponsePass]]:
    """Response passes to try, and what to call them."""

    def around(surroundings: Surroundings) -> Surroundings:
        return surroundings if layers is None else partial(recomputed, layers, surroundings)

    for attention in attentions:
        surroundings = around(partial(use_attention, backbone, attention))
        packed = packed_responses(backbone, loss or LogitsLoss(backbone), surroundings)
        yield f"the packed response pass with {attention} attention", packed
    if loss or layers:
        yield "the padded response pass", padded_responses(backbone, loss or LogitsLoss(backbone), around(nullcontext))


def first_equal(candidates: Iterator[tuple[str, P]], obstacle: Callable[[P], str | None]) -> P | None:
    """The first candidate with no obstacle; a warning for each before it."""
    for name, candidate in candidates:
        found = obstacle(candidate)
        if found is None:
            return candidate
        log.warning("%s cannot be used on this backbone: %s", name, found)
    return None
