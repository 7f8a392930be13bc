"""Prompts in, hidden states at the new tokens behind them out, without autograd: the one forward pass of inference.

What many prompts begin with (a chat template, an instruction) is read once, and every batch goes on from there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.backbone.attention.registry import GROUPS, packed_twin
from pipeline.backbone.attention.segments import Segments
from pipeline.backbone.output_head import at_least_float32
from pipeline.core.errors import BackboneError
from pipeline.encoder.passes.packed import PackedBackbone, interleave
from pipeline.encoder.passes.plain import PlainPasses, QueryPass
from pipeline.encoder.passes.select import HALF_LIMITS, LIMITS, MISFITS, first_equal, packed_attentions


@dataclass(frozen=True)
class Beginning:
    """What prompts begin with.

    Attributes:
        ids: its tokens.
        cache: its keys and values; None where each prompt reads them itself.
    """

    ids: tuple[int, ...] = ()
    cache: DynamicCache | None = None

    @property
    def read_again(self) -> int:
        """Tokens of it that each prompt costs all the same."""
        return 0 if self.cache is not None else len(self.ids)


class PromptReader(Protocol):
    """Runs prompts and the new tokens behind them.

    Attributes:
        padded: see `QueryPass`.
    """

    @property
    def padded(self) -> bool:
        """See the class."""
        ...

    def begin(self, ids: Sequence[int]) -> Beginning:
        """Read what prompts begin with."""
        ...

    def read(self, beginning: Beginning, rests: Sequence[Sequence[int]], tokens: Tensor, count: int) -> Tensor:
        """Final-normed hidden states `[B, count, d]` of the last `count` new tokens, in float32 or better.

        Args:
            beginning: of all the prompts.
            rests: token ids of each prompt behind it, at least one.
            tokens: rows of the new tokens `[N, d]`, appended to each prompt.
            count: how many of the last new tokens to return.
        """
        ...


class PackedReader:
    """`PromptReader` without padding: a batch is one row."""

    padded = False

    def __init__(self, backbone: PackedBackbone) -> None:
        """`backbone` runs packed rows."""
        self._backbone = backbone

    def begin(self, ids: Sequence[int]) -> Beginning:
        """See `PromptReader.begin`."""
        if not ids:
            return Beginning()
        # Without the config: a sliding-window cache layer would forget the start of a long beginning.
        cache = DynamicCache()
        self._backbone.hidden(self._backbone.words([ids]), Segments.of([len(ids)]), cache)
        return Beginning(tuple(ids), _Unchanged(cache))

    def read(self, beginning: Beginning, rests: Sequence[Sequence[int]], tokens: Tensor, count: int) -> Tensor:
        """See `PromptReader.read`."""
        words = self._backbone.words(rests)
        row = interleave(torch.split(words, [len(ids) for ids in rests]), [tokens.to(words.dtype)] * len(rests))
        lengths = [len(ids) + len(tokens) for ids in rests]
        hidden = self._backbone.hidden(row, Segments.of(lengths, shared=len(beginning.ids)), beginning.cache)
        ends = torch.tensor(list(accumulate(lengths)), device=row.device)[:, None]
        return at_least_float32(hidden[ends + torch.arange(-count, 0, device=row.device)])


class PaddedReader:
    """`PromptReader` through a query pass: each prompt is read whole."""

    def __init__(self, queries: QueryPass) -> None:
        """`queries` runs the prompts."""
        self._queries = queries

    @property
    def padded(self) -> bool:
        """See `PromptReader`."""
        return self._queries.padded

    def begin(self, ids: Sequence[int]) -> Beginning:
        """See `PromptReader.begin`."""
        return Beginning(tuple(ids))

    def read(self, beginning: Beginning, rests: Sequence[Sequence[int]], tokens: Tensor, count: int) -> Tensor:
        """See `PromptReader.read`."""
        return self._queries.query_pass([[*beginning.ids, *ids] for ids in rests], tokens, count)


class _Unchanged(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """A cache that every forward pass begins with and none adds to."""

    def __init__(self, cache: DynamicCache) -> None:
        super().__init__()
        self.layers = cache.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What is cached of the layer, followed by the new states."""
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


# Which way prompts are read on the backbone at hand: packed where that equals the plain way, else padded.

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
