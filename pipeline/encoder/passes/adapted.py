"""Passes of a backbone with LoRA adapters on its query pass."""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.encoder.passes.plain import Passes


class AdaptedPasses:
    """`Passes` whose query pass runs through the adapted backbone and whose response pass through the frozen one."""

    def __init__(self, query: "Passes", response: "Passes", adapted: Any) -> None:
        """`query` must run through `adapted` without freezing prefixes."""
        self._query, self._response, self._adapted = query, response, adapted
        self._dropout = _has_dropout(adapted)
        self.padded = query.padded or response.padded

    def query_pass(self, query_ids: Sequence[Sequence[int]], tokens: "Tensor", read: int) -> "Tensor":
        """See `Passes.query_pass`; the adapters' dropout, if any, is on while gradients are recorded."""
        import torch

        dropping = self._dropout and torch.is_grad_enabled()
        with _drawing(self._adapted, query_ids, tokens) if dropping else contextlib.nullcontext():
            return self._query.query_pass(query_ids, tokens, read)

    def response_pass(self, soft_prompts: "Tensor", response_ids: Sequence[Sequence[int]]) -> "tuple[Tensor, int]":
        """See `Passes.response_pass`."""
        return self._response.response_pass(soft_prompts, response_ids)


def _has_dropout(adapted: Any) -> bool:
    from torch.nn import Dropout

    return any(isinstance(module, Dropout) and module.p > 0 for module in _dropouts(adapted))


def _dropouts(adapted: Any) -> "Iterator[nn.Module]":
    from peft.tuners.lora import LoraLayer

    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            yield from module.lora_dropout.values()


@contextlib.contextmanager
def _drawing(adapted: Any, query_ids: Sequence[Sequence[int]], tokens: "Tensor") -> Iterator[None]:
    """Dropout, seeded by the trained rows and the queries: other masks each step, the same after a resume."""
    import torch

    content = tokens.detach().float().cpu().numpy().tobytes() + repr(list(map(list, query_ids))).encode()
    with torch.random.fork_rng(devices=[tokens.device] if tokens.is_cuda else []):
        torch.manual_seed(zlib.crc32(content))
        try:
            for module in _dropouts(adapted):
                module.train()
            yield
        finally:
            for module in _dropouts(adapted):
                module.eval()
