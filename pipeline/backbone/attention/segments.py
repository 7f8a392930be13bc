"""Where the sequences of a packed row lie: lengths in, slices, positions and owners of tokens out.

A packed row is one row of a batch that holds several sequences one after another. What each sequence already has in the
key-value cache lies packed in the same order, behind what all of them begin with:

    cache   shared | prefix 0 | prefix 1 | ...        row   new 0 | new 1 | ...

Keys that an attention function gets are the cache followed by the row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

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
        """Segments of these lengths, none of their own tokens cached unless `prefix` is given."""
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
        """Of each sequence: its tokens in the row, and the pieces of the keys that are its own, in order."""
        for before, own in zip(_spans(self.prefix), _spans(self.new), strict=True):
            pieces = [(0, self.shared), _moved(before, self.shared), _moved(own, self.cached)]
            yield slice(*own), [slice(*piece) for piece in pieces if piece[0] < piece[1]]

    def positions(self, device: torch.device) -> Tensor:
        """Position ids `[1, sum(new)]`, going on behind what is cached of each sequence."""
        return self._queries()[1][None].to(device)

    def queries(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sequence and position of each token in the row, each `[sum(new)]`."""
        owner, position = self._queries()
        return owner.to(device), position.to(device)

    def keys(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sequence (`SHARED`: of all) and position of each key, each `[cached + sum(new)]`."""
        shared = torch.full((self.shared,), SHARED), torch.arange(self.shared)
        cached = _tokens([(self.shared, length) for length in self.prefix])
        owner, position = (torch.cat(parts).to(device) for parts in zip(shared, cached, self._queries(), strict=True))
        return owner, position

    def _queries(self) -> tuple[Tensor, Tensor]:
        return _tokens([(self.shared + before, own) for before, own in zip(self.prefix, self.new, strict=True)])


def _spans(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    return pairwise(accumulate(lengths, initial=0))


def _moved(span: tuple[int, int], by: int) -> tuple[int, int]:
    return span[0] + by, span[1] + by


def _tokens(runs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Number of the run and position of each token, for runs given as (first position, length)."""
    owner = torch.repeat_interleave(torch.arange(len(runs)), torch.tensor([length for _, length in runs]))
    return owner, torch.cat([torch.arange(start, start + length) for start, length in runs])


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with (a chat template, an instruction), leaving each at least one of its own."""
    if len(rows) < 2:
        return 0
    first, last = min(map(list, rows)), max(map(list, rows))
    common = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(common, min(len(row) for row in rows) - 1)
