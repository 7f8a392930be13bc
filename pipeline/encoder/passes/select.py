"""The passes that a backbone can run. An option that it cannot do is replaced, with a warning, by what it can.

    packed                one row without padding (else: padded batches)
    frozen_prefix         queries run without autograd into a cache (else: autograd through the whole query)
    fused_cross_entropy   chunked, at response positions only (else: all logits)
    checkpoint_responses  layers of the response pass keep their inputs only and run again in the backward pass
    recompute_gates       on a GPU, of this share of its layers the feed-forward networks only do so

With all of them off the passes are the plain ones, and every combination equals those in loss and gradients up to
rounding. What is built is compared with them on a few tokens before it is used.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pipeline.backbone.attention.registry import (
    Attention,
    Implementation,
    check_layers,
    choose_attention,
)
from pipeline.backbone.attention.segments import Segments
from pipeline.backbone.fused import FusedKernels, fused_kernels
from pipeline.core.errors import BackboneError, first_line
from pipeline.core.run import is_out_of_memory
from pipeline.encoder.passes.activation_checkpointing import ContextFactory, checkpointable_layers, checkpointing
from pipeline.encoder.passes.packed import (
    FrozenPackedQueryPass,
    PackedBackbone,
    PackedQueryPass,
    packed_context,
    packed_response_pass,
)
from pipeline.encoder.passes.padded import FrozenPaddedQueryPass, padded_response_pass
from pipeline.encoder.passes.plain import Passes, Pooled, QueryPass, ResponsePass, plain_passes
from pipeline.encoder.passes.response import FusedLoss, LogitsLoss, ResponseLoss

log = logging.getLogger(__name__)

C = TypeVar("C")
# What a library raises where an architecture does not fit.
_MISFITS = (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError)
# Largest relative differences of values and of gradients from the plain ones. Deep models amplify rounding, in half
# precision to a good part of a gradient: there only one that is cut off (1.0) differs from an honest one.
_LIMITS = (1e-3, 0.05)
_HALF_LIMITS = (0.1, 0.99)


def make_passes(
    backbone: Any,
    *,
    packed: bool = True,
    frozen_prefix: bool = True,
    fused_cross_entropy: bool = True,
    checkpoint_responses: bool = False,
    recompute_gates: float = 0.0,
    attention: Attention = "auto",
    chunk: int | None = None,
    share_prefix: bool = True,
) -> Passes:
    """Passes with these options (see the module), as far as the backbone, a causal LM in eval mode, can.

    If parts of it are trained, no prefix is frozen. `chunk` response positions have logits at a time; None chooses by
    the vocabulary. `share_prefix` runs the common beginning of a batch's queries once; off where all processes must run
    the same number of forward passes.

    Raises:
        BackboneError: `attention` cannot run here, or no layer can be checkpointed.
    """
    plain = plain_passes(backbone)
    if not (packed or frozen_prefix or fused_cross_entropy or checkpoint_responses):
        return plain
    probe = _Probe(backbone)
    compare_queries = Comparison(backbone, probe.query_values, plain.query_pass)
    compare_responses = Comparison(backbone, probe.response_values, plain.response_pass)
    frozen_prefix = frozen_prefix and _is_frozen(backbone)
    attentions = packed_attentions(backbone, attention) if packed else []
    loss = _fused_loss(backbone, chunk) if fused_cross_entropy else None
    layers = checkpointable_layers(backbone) if checkpoint_responses else None
    queries = compare_queries.first_equal(_query_passes(backbone, attentions, frozen_prefix, share_prefix))
    gates = 0.0 if layers else recompute_gates
    responses = compare_responses.first_equal(_response_passes(backbone, attentions, loss, layers, gates))
    together = isinstance(queries, FrozenPackedQueryPass)
    return Passes(queries or plain.query_pass, responses or plain.response_pass, queries_together=together)


class Comparison(Generic[C]):
    """Compares ways to compute the same values with the plain one, on a few tokens."""

    def __init__(
        self,
        backbone: Any,
        compute: Callable[[C], list[Tensor]],
        plain: C,
        names: tuple[str, ...] = ("values", "gradients"),
    ) -> None:
        """`compute` gives a tensor for each of `names`; BackboneError if the backbone cannot run the plain way."""
        half = backbone.dtype in (torch.bfloat16, torch.float16)
        self._compute, self._names, self._limits = compute, names, _HALF_LIMITS if half else _LIMITS
        try:
            self._expected = compute(plain)
        except _MISFITS as error:
            if is_out_of_memory(error):
                raise
            raise BackboneError(f"{type(backbone).__name__} cannot run on input embeddings: {error}") from None

    def first_equal(self, candidates: Iterator[tuple[str, C]]) -> C | None:
        """The first of named candidates that equals the plain way; a warning for each before it."""
        for name, candidate in candidates:
            obstacle = self._obstacle(candidate)
            if obstacle is None:
                return candidate
            log.warning("%s cannot be used on this backbone: %s", name, obstacle)
        return None

    def _obstacle(self, candidate: C) -> str | None:
        try:
            found = self._compute(candidate)
        except _MISFITS as error:
            if is_out_of_memory(error):
                raise
            return first_line(error)
        for name, limit, value, expected in zip(self._names, self._limits, found, self._expected, strict=False):
            difference = float((value - expected).norm() / expected.norm())
            if not difference <= limit:
                return f"its {name} differ from the plain ones by {difference:.2g} (limit {limit})"
        return None


def probe_ids(embed: Any, number: int, length: int) -> list[int]:
    """Row `number` of token ids from all over the vocabulary but its beginning, where special tokens are."""
    vocabulary = len(embed.weight)
    first = vocabulary // 50
    return [first + 7919 * (100 * number + place) % (vocabulary - first) for place in range(length)]


class _Probe:
    """A few tokens to run passes on, for their values and gradients."""

    def __init__(self, backbone: Any) -> None:
        self._embed = backbone.get_input_embeddings()
        begin, *rest = (probe_ids(self._embed, number, length) for number, length in enumerate((3, 9, 2, 14)))
        self._query_ids = [begin + ids for ids in rest]
        self._response_ids = [probe_ids(self._embed, number, length) for number, length in ((4, 6), (5, 1), (6, 11))]

    def query_values(self, query_pass: QueryPass) -> list[Tensor]:
        tokens = self._rows(8, 3)
        pooled = Pooled([slice(len(ids) - 2, len(ids)) for ids in self._query_ids], with_tokens=True)
        hidden = query_pass(self._query_ids, tokens, 2, pooled)
        weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
        return [hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), tokens)]

    def response_values(self, response_pass: ResponsePass) -> list[Tensor]:
        soft_prompts = self._rows(9, 6).view(3, 2, -1)
        loss, _ = response_pass(soft_prompts, self._response_ids)
        return [loss.detach(), *torch.autograd.grad(loss, soft_prompts)]

    def _rows(self, number: int, length: int) -> Tensor:
        ids = torch.tensor(probe_ids(self._embed, number, length), device=self._embed.weight.device)
        return self._embed(ids).detach().requires_grad_()


def _is_frozen(backbone: Any) -> bool:
    frozen = not any(parameter.requires_grad for parameter in backbone.parameters())
    if not frozen:
        log.info("frozen_prefix: parts of the backbone are trained, so no prefix is frozen")
    return frozen


def packed_attentions(backbone: Any, requested: Attention) -> list[Implementation]:
    """Attentions of packed rows, the best first; none where the architecture cannot be packed."""
    chosen, reason = choose_attention(backbone, requested)
    try:
        check_layers(backbone, partial(_run_packed, backbone))
    except BackboneError as error:
        log.warning("%s; its batches are padded", error)
        return []
    log.info("attention: packed rows attend with %s: %s", chosen, reason)
    return [chosen, "segments"] if requested == "auto" and chosen != "segments" else [chosen]


def _run_packed(backbone: Any, attention: str) -> None:
    rows = PackedBackbone(backbone, attention)
    try:
        with torch.no_grad():
            rows.hidden(rows.embedded([[1, 2, 3], [4]]), Segments.of([3, 1]))
    except _MISFITS as error:
        raise BackboneError(f"{type(backbone).__name__} cannot be packed ({error})") from None


def _fused_loss(backbone: Any, chunk: int | None) -> ResponseLoss | None:
    try:
        return FusedLoss(backbone, chunk)
    except BackboneError as error:
        log.warning("%s; all its logits are made at once", error)
        return None


def _packed_ways(
    backbone: Any, attentions: list[Implementation]
) -> Iterator[tuple[str, Implementation, FusedKernels | None]]:
    """Names, attentions and kernels of packed passes, the fastest first."""
    kernels = fused_kernels(backbone) if attentions else None
    for attention in attentions:
        if kernels:
            yield f"{attention} attention and fused kernels", attention, kernels
        yield f"{attention} attention", attention, None


def _query_passes(
    backbone: Any, attentions: list[Implementation], frozen_prefix: bool, share_prefix: bool
) -> Iterator[tuple[str, QueryPass]]:
    for name, attention, kernels in _packed_ways(backbone, attentions):
        rows = PackedBackbone(backbone, attention, kernels)
        packed = FrozenPackedQueryPass(rows, share_prefix=share_prefix) if frozen_prefix else PackedQueryPass(rows)
        yield f"the packed query pass with {name}", packed
    if frozen_prefix:
        yield "the query pass with a frozen prefix", FrozenPaddedQueryPass(backbone)


def _response_passes(
    backbone: Any, attentions: list[Implementation], loss: ResponseLoss | None, layers: list[Any] | None, gates: float
) -> Iterator[tuple[str, ResponsePass]]:
    chosen = loss or LogitsLoss(backbone)

    def checkpointed(context: ContextFactory) -> ContextFactory:
        return context if layers is None else partial(checkpointing, layers, context)

    for name, attention, kernels in _packed_ways(backbone, attentions):
        kernels = kernels.recomputing(gates) if kernels else None
        context = checkpointed(packed_context(backbone, attention, kernels))
        yield f"the packed response pass with {name}", packed_response_pass(backbone, chosen, context)
    if loss or layers:
        yield "the padded response pass", padded_response_pass(backbone, chosen, checkpointed(nullcontext))
