"""Dropout in a model that otherwise runs in eval mode, drawn from seeds of its own.

Language models of today have no dropout modules; their attention has a rate of 0 that counts in training mode. Older
ones (GPT-2) have a dropout module inside attention, whose rate the attention reads when it is itself in training mode.
So only the modules that drop are ever put into that mode, and what they draw is a function of the seed, whatever was
drawn before.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)


class Noise:
    """The dropout of one adapted model, off except within `drawing`."""

    def __init__(self, body: Any, rate: float) -> None:
        """Set the rates; that of the LoRA modules stays as it is.

        Args:
            body: with its adapters, in eval mode.
            rate: of attention weights; of dropout modules where the architecture drops none of these; 0 leaves only
                LoRA's.
        """
        from torch.nn import Dropout

        lora = {id(module) for module in _lora_dropouts(body)}
        self._body = body
        self._lora = [module for module in _lora_dropouts(body) if isinstance(module, Dropout) and module.p > 0]
        found = {module: key for module in body.modules() if (key := _attention_key(module))} if rate else {}
        self._attention = list(found)
        self._inner = [getattr(module, key) for module, key in found.items() if _is_dropout(getattr(module, key))]
        others = [module for module in body.modules() if isinstance(module, Dropout) and id(module) not in lora]
        self._modules = others if rate and not found else []
        for module, key in found.items():
            if not _is_dropout(getattr(module, key)):
                setattr(module, key, rate)
        for module in [*self._inner, *self._modules]:
            module.p = rate
        self.rate = rate

    @property
    def architecture(self) -> bool:
        """Whether anything but LoRA's inputs drops."""
        return bool(self._attention or self._modules)

    @property
    def active(self) -> dict[str, int]:
        """How many modules drop, by kind; only kinds that there are."""
        counts = {"attention": len(self._attention), "modules": len(self._modules), "lora": len(self._lora)}
        return {kind: count for kind, count in counts.items() if count}

    @contextlib.contextmanager
    def drawing(self, *seed: int) -> Iterator[None]:
        """Dropout on, drawn from this seed; the state of the random generators is restored after."""
        import numpy as np
        import torch

        device = self._body.device
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(state >> 1))
            self._switch(on=True)
            try:
                yield
            finally:
                self._switch(on=False)

    def _switch(self, *, on: bool) -> None:
        modules: Sequence[nn.Module] = [*self._attention, *self._inner, *self._modules, *self._lora]
        for module in modules:
            module.training = on


# The names that architectures have for the rate of attention weights, or for a module of that rate.
_ATTENTION_KEYS = ("attention_dropout", "attn_dropout", "attn_dropout_p")


def _attention_key(module: Any) -> str | None:
    """The attribute by which a module drops attention weights; None where it does not.

    OPT's attention calls it `dropout`, which elsewhere may be anything's.
    """
    keys = (*_ATTENTION_KEYS, "dropout") if type(module).__name__.endswith("Attention") else _ATTENTION_KEYS
    return next((key for key in keys if _is_rate(getattr(module, key, None))), None)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) or _is_dropout(value)


def _is_dropout(value: Any) -> bool:
    from torch.nn import Dropout

    return isinstance(value, Dropout)


def _lora_dropouts(body: Any) -> "list[nn.Module]":
    from peft.tuners.lora import LoraLayer

    layers = [module for module in body.modules() if isinstance(module, LoraLayer)]
    return [module for layer in layers for module in layer.lora_dropout.values()]
