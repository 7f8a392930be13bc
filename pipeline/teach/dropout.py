"""Dropout with seeds of its own, in a model that otherwise runs in eval mode.

Today's language models have no dropout modules; their attention has a rate of 0 that counts in training mode. Older
ones (GPT-2) have a dropout module inside attention, which reads its rate when it is itself in training mode. So only
the modules that drop are put into training mode.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np


class SeededDropout:
    """The dropout of one adapted model, off except within `enabled`."""

    def __init__(self, body: Any, rate: float) -> None:
        """Set the rates of all modules but LoRA's, which keep theirs.

        Args:
            body: with its adapters, in eval mode.
            rate: of attention weights, or of dropout modules where attention has none; 0 leaves only LoRA's dropout.
        """
        from peft.tuners.lora import LoraLayer
        from torch.nn import Dropout

        layers = [module for module in body.modules() if isinstance(module, LoraLayer)]
        lora = [module for layer in layers for module in layer.lora_dropout.values()]
        found = {module: key for module in body.modules() if (key := _attention_key(module))} if rate else {}
        inside = [getattr(module, key) for module, key in found.items()]
        others = [module for module in body.modules() if isinstance(module, Dropout) and module not in lora]
        self._body = body
        self._lora = [module for module in lora if isinstance(module, Dropout) and module.p > 0]
        self._attention = list(found)
        self._in_attention = [module for module in inside if isinstance(module, Dropout)]
        self._modules = others if rate and not found else []
        for module, key in found.items():
            if not isinstance(getattr(module, key), Dropout):
                setattr(module, key, rate)
        for module in [*self._in_attention, *self._modules]:
            module.p = rate
        self.rate = rate

    @property
    def drops_in_backbone(self) -> bool:
        """Whether anything but LoRA's inputs is dropped."""
        return bool(self._attention or self._modules)

    @property
    def active(self) -> dict[str, int]:
        """Number of modules that drop, by kind; without kinds that have none."""
        counts = {"attention": len(self._attention), "modules": len(self._modules), "lora": len(self._lora)}
        return {kind: count for kind, count in counts.items() if count}

    @contextlib.contextmanager
    def enabled(self, *seed: int) -> Iterator[None]:
        """Dropout on, drawn from this seed; afterwards off, with the random generators as before."""
        import torch

        device = self._body.device
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(state >> 1))
            self._set_training(True)
            try:
                yield
            finally:
                self._set_training(False)

    def _set_training(self, training: bool) -> None:
        for module in [*self._attention, *self._in_attention, *self._modules, *self._lora]:
            module.training = training


# Attributes that hold the rate of attention weights, or a module of that rate.
_ATTENTION_KEYS = ("attention_dropout", "attn_dropout", "attn_dropout_p")


def _attention_key(module: Any) -> str | None:
    """The attribute by which a module drops attention weights; None if it drops none.

    OPT's attention calls it `dropout`, which elsewhere may be another rate.
    """
    from torch.nn import Dropout

    keys = (*_ATTENTION_KEYS, "dropout") if type(module).__name__.endswith("Attention") else _ATTENTION_KEYS
    return next((key for key in keys if isinstance(getattr(module, key, None), int | float | Dropout)), None)
