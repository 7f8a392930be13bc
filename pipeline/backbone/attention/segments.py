"""Layout of a packed row: lengths of sequences in, slices, positions and owners of tokens out.

A packed row is one row of a batch that holds several sequences one after another. Their tokens in the key-value cache
are packed in the same order, behind the beginning that all share:

    cache   shared | prefix 0 | prefix 1 | ...        row   new 0 | new 1 | ...

An attention function gets as keys the cache followed by the row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pipeline.backbone.device import to_device

SHARED = -1


@dataclass(frozen=True)
class Segments:
    """Lengths of the sequences in a packed row.

    Attributes:
        new: tokens of each sequence in the row.
        prefix: tokens of each sequence in the cache.
        shared: tokens at the start of the cache that every sequence begins with.
    """

    new: tuple[int, ...]
    prefix: tuple[int, ...]
    shared: int = 0

    @classmethod
    def of(cls, new: Sequence[int], prefix: Sequence[int] | None = None, shared: int = 0) -> "Segments":
        """Segments of these lengths; without `prefix` no sequence has tokens of its own in the cache."""
        return cls(tuple(new), tuple(prefix) if prefix else (0,) * len(new), shared)

    @property
    def cached(self) -> int:
        """Tokens in the cache."""
        return self.shared + sum(self.prefix)

    @property
    def total(self) -> tuple[int, ...]:
        """Tokens that each sequence sees at its end."""
        return tuple(self.shared + before + own for before, own in zip(self.prefix, self.new, strict=True))

    def slices(self) -> Iterator[tuple[slice, list[slice]]]:
        """Of each sequence: its tokens in the row, and the slices of the keys that it sees, in order."""
        for before, own in zip(_spans(self.prefix), _spans(self.new), strict=True):
            pieces = [slice(0, self.shared), _slice(before, self.shared), _slice(own, self.cached)]
            yield _slice(own), [piece for piece in pieces if piece.start < piece.stop]

    def positions(self, device: torch.device) -> Tensor:
        """Position ids `[1, sum(new)]`; each sequence continues behind its cached tokens."""
        return index_tensors(self, device).positions if device.type == "cuda" else self.queries(device)[1][None]

    def queries(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sequence and position of each token in the row, each `[sum(new)]`."""
        owner, position = _tokens(
            [(self.shared + before, own) for before, own in zip(self.prefix, self.new, strict=True)]
        )
        return owner.to(device), position.to(device)

    def keys(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sequence (`SHARED`: of all) and position of each key, each `[cached + sum(new)]`."""
        shared = torch.full((self.shared,), SHARED), torch.arange(self.shared)
        cached = _tokens([(self.shared, length) for length in self.prefix])
        new = self.queries(torch.device("cpu"))
        owner, position = (torch.cat(parts).to(device) for parts in zip(shared, cached, new, strict=True))
        return owner, position


@dataclass(frozen=True)
class IndexTensors:
    """What a forward pass over a packed row looks up, on the device.

    Attributes:
        positions: `[1, sum(new)]`, position ids.
        query_ends: int32 `[sequences + 1]`, cumulative lengths of the queries.
        key_ends: int32 `[sequences + 1]`, cumulative lengths of the keys.
        keys: `[sum(total)]`, indices of the keys in order of their sequences; None: they lie in it.
    """

    positions: Tensor
    query_ends: Tensor
    key_ends: Tensor
    keys: Tensor | None


@lru_cache(maxsize=8)
def index_tensors(segments: Segments, device: torch.device) -> IndexTensors:
    """Made once for all layers of a pass, in one copy to the device."""
    # Tensors made in inference mode cannot be used in training.
    with torch.inference_mode(False):
        reads = [torch.arange(piece.start, piece.stop) for _, pieces in segments.slices() for piece in pieces]
        _, position = segments.queries(torch.device("cpu"))
        ends = [torch.tensor(list(accumulate(lengths, initial=0))) for lengths in (segments.new, segments.total)]
        order = [torch.cat(reads)] if segments.cached else []
        positions, query_ends, key_ends, *keys = to_device([position, *ends, *order], device)
        lengths = query_ends.to(torch.int32), key_ends.to(torch.int32)
        return IndexTensors(positions[None], *lengths, keys[0] if keys else None)


def _spans(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    return pairwise(accumulate(lengths, initial=0))


def _slice(span: tuple[int, int], offset: int = 0) -> slice:
    return slice(span[0] + offset, span[1] + offset)


def _tokens(runs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Number of the run and position of each token, for runs given as (first position, length)."""
    owner = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor([length for _, length in runs]))
    return owner, torch.cat([torch.arange(start, start + length) for start, length in runs])


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the rows' common beginning (a chat template, an instruction), at least one token short of each row."""
    if len(rows) < 2:
        return 0
    first, last = min(map(list, rows)), max(map(list, rows))
    common = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(common, min(len(row) for row in rows) - 1)
