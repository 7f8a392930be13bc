"""Fused kernels for what a decoder layer does beside its matrix products, on a GPU.

    norm        `torch.nn.functional.rms_norm`: one kernel forward and one backward. transformers' own launches six and
                keeps the input in float32; this keeps it in its own dtype, and one number a token.
    gate        `act(gate) * up`, compiled: one kernel each way; keeps both factors and not the activation. Where it is
                computed again in the backward pass it keeps the network's input alone.
    rotation    `apply_rotary_pos_emb`, compiled: a kernel each for queries and keys.

They are set on the modules while a block runs, like the attention; outside it the backbone is unchanged. Each kind is
compared with its module before it is used, and `make_passes` compares whole passes: they are equal up to rounding.
"""

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.core.errors import first_line

log = logging.getLogger(__name__)

_ROTATION = "apply_rotary_pos_emb"
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
# Largest difference of a fused module from its own, relative to the largest value: rounding of half precision.
_LIMIT = 0.02
_PROBE_ROWS = 4


@dataclass(frozen=True)
class FusedKernels:
    """What replaces what.

    Attributes:
        forwards: of modules.
        rotations: modules of Python whose `apply_rotary_pos_emb` is replaced, each with the replacement.
    """

    forwards: list[tuple[nn.Module, Callable[..., Tensor]]]
    rotations: list[tuple[Any, Callable[..., Any]]]

    def recomputing(self, share: float) -> "FusedKernels":
        """The same kernels; the gates of this share of the layers are computed again in the backward pass.

        They are those of the first layers: the backward pass comes to them last, when most of the memory is free.
        """
        gated = [module for module, forward in self.forwards if _is_gated(forward)]
        again = set(gated[: math.ceil(share * len(gated))])
        return FusedKernels(
            [(module, _recomputed(forward) if module in again else forward) for module, forward in self.forwards],
            self.rotations,
        )

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block the kernels are used."""
        before = [vars(module).get("forward") for module, _ in self.forwards]
        originals = [getattr(code, _ROTATION) for code, _ in self.rotations]
        try:
            for module, forward in self.forwards:
                module.forward = forward
            for code, rotation in self.rotations:
                setattr(code, _ROTATION, rotation)
            yield
        finally:
            for (module, _), own in zip(self.forwards, before, strict=True):
                if own is None:
                    del module.forward
                else:
                    module.forward = own
            for (code, _), original in zip(self.rotations, originals, strict=True):
                setattr(code, _ROTATION, original)


def fused_kernels(backbone: Any) -> FusedKernels | None:
    """The fused kernels for a causal LM on a GPU; None elsewhere, or where no module can be replaced."""
    if backbone.get_input_embeddings().weight.device.type != "cuda":
        return None
    forwards = [(module, forward) for module in backbone.get_decoder().modules() if (forward := _fused(module))]
    forwards = _equal_ones(forwards)
    code = {sys.modules[type(module).__module__] for module in backbone.get_decoder().modules()}
    rotations = [(found, compiled(getattr(found, _ROTATION))) for found in code if hasattr(found, _ROTATION)]
    return FusedKernels(forwards, rotations) if forwards or rotations else None


def _fused(module: nn.Module) -> Callable[..., Tensor] | None:
    """The fused forward of a norm or of a gated feed-forward network; None for other modules."""
    if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), nn.Parameter):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return partial(_rms_norm, module, eps) if isinstance(eps, float) else None
    if all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED):
        return partial(_gated, module, compiled(_gate))
    return None


def _rms_norm(module: Any, eps: float, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, module.weight.shape, module.weight, eps)


def _gated(module: Any, gate: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    return module.down_proj(_product(module, gate, hidden))


def _gated_again(module: Any, gate: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    # No generator's state is kept: reading it would make the host wait, and nothing here is random.
    product = checkpoint(_product, module, gate, hidden, use_reentrant=False, preserve_rng_state=False)
    return module.down_proj(product)


def _product(module: Any, gate: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    return gate(module.act_fn, module.gate_proj(hidden), module.up_proj(hidden))


def _is_gated(forward: Callable[..., Tensor]) -> bool:
    return isinstance(forward, partial) and forward.func is _gated


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return partial(_gated_again, *forward.args) if isinstance(forward, partial) else forward


def _gate(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one compiled graph for any number of tokens; compiled at its first call, which takes seconds."""
    return torch.compile(function, dynamic=True, fullgraph=True)


def _equal_ones(
    forwards: list[tuple[nn.Module, Callable[..., Tensor]]],
) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """Those that compute what their modules compute; one of each kind is run."""
    equal: dict[Any, bool] = {}
    for module, forward in forwards:
        if _kind(module) not in equal:
            equal[_kind(module)] = equals(module, forward)
    return [(module, forward) for module, forward in forwards if equal[_kind(module)]]


def _kind(module: nn.Module) -> tuple[Any, ...]:
    return type(module), *(tuple(parameter.shape) for parameter in module.parameters())


@torch.no_grad()
def equals(module: Any, forward: Callable[..., Tensor]) -> bool:
    """Whether a fused forward gives a module's own values on a few random rows, up to rounding."""
    weight = module.weight if hasattr(module, "weight") else module.gate_proj.weight
    hidden = torch.randn(1, _PROBE_ROWS, weight.shape[-1], dtype=torch.float32, device=weight.device)
    hidden = hidden.to(next(module.parameters()).dtype)
    own = type(module).forward(module, hidden).float()
    try:
        difference = float((forward(hidden).float() - own).abs().max() / own.abs().max())
    except (RuntimeError, TypeError) as error:
        log.info("fused kernels: %s keeps its own (%s)", type(module).__name__, first_line(error))
        return False
    if not difference <= _LIMIT:
        log.info("fused kernels: %s keeps its own (it differs by %.2g)", type(module).__name__, difference)
        return False
    return True
