"""Activation checkpointing of decoder layers that stay in eval mode.

transformers' own needs train mode, which silently drops key-value caches and enables dropout, and recomputes with the
attention that the config then names. Here each recomputation, in the backward pass, enters the context of the forward.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from pipeline.core.errors import BackboneError

ContextFactory = Callable[[], AbstractContextManager[None]]


def checkpointable_layers(backbone: Any) -> list[Any]:
    """The decoder layers, as transformers marks them; BackboneError if there are none."""
    layers = [module for module in backbone.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BackboneError(f"{type(backbone).__name__} has no layers that can be checkpointed")
    return layers


@contextlib.contextmanager
def checkpointing(layers: list[Any], context: ContextFactory) -> Iterator[None]:
    """In the block, which runs within `context`, layers keep only their inputs and run again in backward."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward, context)
    try:
        with context():
            yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _checkpointed(forward: Callable[..., Any], context: ContextFactory, *args: Any, **kwargs: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return forward(*args, **kwargs)

    # No generator's state is kept: reading it would make the host wait, and nothing here is random.
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
