"""Which rows a step takes: a function of the seed and the step, so that a resumed run takes the same ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.encoder.batching import epoch_order

if TYPE_CHECKING:
    import numpy as np


class Batches:
    """Endless batches of a fixed size; what does not fill one at the end of an epoch is left to other epochs."""

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int, grouping: int = 1) -> None:
        """Set the rules.

        Args:
            lengths: tokens of each row, at least `batch_size` of them.
            batch_size: rows of a batch.
            seed: of the order.
            grouping: the rows of this many random batches are sorted by length before they are cut, and the batches
                shuffled: next to no padding, and every row as often as any other. 1: batches are random.
        """
        self._lengths, self._size, self._seed, self._grouping = lengths, batch_size, seed, grouping
        self._per_epoch = len(lengths) // batch_size
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def at(self, step: int) -> list[int]:
        """Rows of a step (from 0), the longest first."""
        epoch, index = divmod(step, self._per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._batches(epoch)
        return sorted(self._epoch[1][index], key=lambda row: (-self._lengths[row], row))

    def _batches(self, epoch: int) -> list[list[int]]:
        order = epoch_order(len(self._lengths), epoch, self._seed)[: self._per_epoch * self._size]
        if self._grouping == 1:
            return self._cut(order, self._size)
        windows = self._cut(order, self._size * self._grouping)
        batches = [batch for window in windows for batch in self._cut(self._sorted(window), self._size)]
        return [batches[at] for at in epoch_order(len(batches), epoch, self._seed)]

    def _sorted(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=lambda row: (self._lengths[row], row))

    @staticmethod
    def _cut(rows: "Sequence[int] | np.ndarray[Any, Any]", size: int) -> list[list[int]]:
        return [list(map(int, rows[start : start + size])) for start in range(0, len(rows), size)]


def parts(rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows cut, in their order, into forward passes of at most `size`."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
