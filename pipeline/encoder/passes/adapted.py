"""The query pass of a backbone with LoRA adapters."""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.encoder.passes.plain import Pooled, QueryPass


class AdaptedQueryPass:
    """`QueryPass` through an adapted backbone, with the adapters' dropout while gradients are recorded."""

    def __init__(self, query_pass: QueryPass, adapted: Any) -> None:
        """`query_pass` must run through `adapted` without freezing prefixes."""
        self._query_pass, self.padded = query_pass, query_pass.padded
        dropouts = [module for module in _dropouts(adapted) if isinstance(module, nn.Dropout)]
        self._dropouts = dropouts if any(module.p > 0 for module in dropouts) else []

    def __call__(
        self, query_ids: Sequence[Sequence[int]], tokens: Tensor, read: int, pooled: Pooled | None = None
    ) -> Tensor:
        with self._dropout(query_ids, tokens) if torch.is_grad_enabled() else contextlib.nullcontext():
            return self._query_pass(query_ids, tokens, read, pooled)

    @contextlib.contextmanager
    def _dropout(self, query_ids: Sequence[Sequence[int]], tokens: Tensor) -> Iterator[None]:
        """Dropout, seeded by the trained rows and the queries: other masks each step, the same after a resume."""
        if not self._dropouts:
            yield
            return
        content = tokens.detach().float().cpu().numpy().tobytes() + repr(list(map(list, query_ids))).encode()
        with torch.random.fork_rng(devices=[tokens.device] if tokens.is_cuda else []):
            torch.manual_seed(zlib.crc32(content))
            try:
                for module in self._dropouts:
                    module.train()
                yield
            finally:
                for module in self._dropouts:
                    module.eval()


def _dropouts(adapted: Any) -> Iterator[nn.Module]:
    from peft.tuners.lora import LoraLayer

    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            yield from module.lora_dropout.values()
