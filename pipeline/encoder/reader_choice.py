"""Which way prompts are read on the backbone at hand: packed where that equals the plain way, else padded."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.encoder.attention import GROUPS, packed_twin
from pipeline.encoder.packing import PackedBackbone
from pipeline.encoder.passes import PlainPasses
from pipeline.encoder.prompt_reading import PackedReader, PaddedReader, PromptReader
from pipeline.encoder.switches import HALF_LIMITS, LIMITS, MISFITS, first_equal, packed_attentions
from pipeline.errors import BackboneError

# Lengths of probed prompts: two equal neighbours, one token, one longer than the others.
_LENGTHS = (9, 9, 1, 14)
_SHARED = 3
_NEW = 3


def prompt_reader(backbone: Any) -> PromptReader:
    """The fastest reader that the backbone can do, compared with the plain one on a few tokens.

    Args:
        backbone: a causal LM in eval mode.

    Raises:
        BackboneError: it cannot even run the plain one.
    """
    plain = PaddedReader(PlainPasses(backbone))
    check = _Check(backbone, plain)
    return first_equal(_candidates(backbone), check.obstacle) or plain


def _candidates(backbone: Any) -> Iterator[tuple[str, PromptReader]]:
    """Readers to try, and what to call them."""
    trained = packed_attentions(backbone, "auto")
    # The attention of training that keeps what a backward pass needs gives way to the one that does not.
    attentions = dict.fromkeys(GROUPS if attention == "segments" else attention for attention in trained)
    for attention in attentions:
        rows = PackedBackbone(packed_twin(backbone, attention), attention)
        yield f"packed reading with {attention} attention", PackedReader(rows)


class _Check:
    """Compares a reader's hidden states with the plain one's."""

    def __init__(self, backbone: Any, plain: PromptReader) -> None:
        """Raises BackboneError if the backbone cannot run the plain one."""
        embed = backbone.get_input_embeddings()
        vocabulary = len(embed.weight)
        # From all over the vocabulary but its beginning, where special tokens are.
        first = vocabulary // 50
        words = (first + 7919 * place % (vocabulary - first) for place in range(_SHARED + _NEW + sum(_LENGTHS)))
        self._beginning = [next(words) for _ in range(_SHARED)]
        self._rests = [[next(words) for _ in range(length)] for length in _LENGTHS]
        with torch.no_grad():
            self._tokens = embed(torch.tensor([*words], device=embed.weight.device))
        self._limit = (HALF_LIMITS if backbone.dtype in (torch.bfloat16, torch.float16) else LIMITS)[0]
        try:
            self._expected = self._read(plain)
        except MISFITS as error:
            raise BackboneError(f"{type(backbone).__name__} cannot run on input embeddings: {error}") from None

    def obstacle(self, reader: PromptReader) -> str | None:
        """What is wrong with a reader, if anything."""
        try:
            found = self._read(reader)
        except MISFITS as error:
            return str(error).strip().split("\n")[0]
        difference = float((found - self._expected).norm() / self._expected.norm())
        if difference <= self._limit:
            return None
        return f"its hidden states differ from the plain ones by {difference:.2g} (limit {self._limit})"

    @torch.inference_mode()
    def _read(self, reader: PromptReader) -> Tensor:
        """Hidden states of the prompts, with their beginning read once and with each."""
        whole = [[*self._beginning, *ids] for ids in self._rests]
        return torch.cat(
            [
                reader.read(reader.begin(beginning), rests, self._tokens, _NEW - 1)
                for beginning, rests in ((self._beginning, self._rests), ([], whole))
            ]
        )
