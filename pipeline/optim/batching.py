"""Which rows go through a model together: optimiser steps, the forward passes of a step, and those of inference.

The rows of a step depend on seed and step alone, so a resumed run takes the same ones.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
# Rows of forward passes; weight 0: run because another process runs one, and not counted.
OwnPasses = Sequence[tuple[Sequence[int], float]]

# Tokens of one forward pass without autograd, by device.
BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}
CHARACTERS_PER_TOKEN = 4  # of English; other scripts have fewer


def epoch_order(rows: int, epoch: int, seed: int) -> np.ndarray:
    """A permutation of the rows that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def steps(
    lengths: np.ndarray, batch_size: int, epochs: int, *, most: int | None, seed: int, grouping: int = 1
) -> Iterator[list[int]]:
    """Row indices of each optimiser step, at most `most` steps; one batch of an epoch may be smaller.

    The rows of `grouping` random batches are sorted by length before they are cut into batches, whose order is then
    shuffled over the epoch: rows of similar length meet, lengths come in random order. 1: no grouping.
    """
    taken = 0
    for epoch in range(epochs):
        order = epoch_order(len(lengths), epoch, seed)
        for batch in _batches(order, lengths, batch_size, epoch, seed, grouping):
            if taken == most:
                return
            yield batch.tolist()
            taken += 1


def _batches(
    order: np.ndarray, lengths: np.ndarray, batch_size: int, epoch: int, seed: int, grouping: int
) -> list[np.ndarray]:
    """The batches of an epoch as arrays: a list of numbers takes four times as much memory."""
    if grouping == 1:
        return _cut(order, batch_size)
    groups = _cut(order, batch_size * grouping)
    by_length = (group[np.lexsort((group, lengths[group]))] for group in groups)
    batches = [batch for group in by_length for batch in _cut(group, batch_size)]
    return [batches[at] for at in epoch_order(len(batches), epoch, seed)]


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def deal(rows: Sequence[int], lengths: np.ndarray, processes: int) -> list[list[int]]:
    """The rows of a step, longest first, divided among processes so that each gets about as many tokens."""
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    return [ordered[first::processes] for first in range(processes)]


def micro_batches(
    rows: Sequence[int], lengths: np.ndarray, *, most_rows: int, most_tokens: int | None, padded: bool
) -> list[list[int]]:
    """Rows, longest first as `deal` gives them, cut in their order into forward passes.

    A pass has at most `most_tokens` tokens, or `most_rows` rows where that is None. A longer row makes a pass of its
    own. `lengths` are those of all rows of the corpus; `padded`: every row of a pass takes the tokens of the longest.
    """
    if most_tokens is None:
        return parts(rows, most_rows)
    batches: list[list[int]] = []
    tokens = most_tokens + 1
    for row in rows:
        cost = int(lengths[batches[-1][0] if padded and batches else row])
        if tokens + cost > most_tokens:
            batches.append([])
            tokens, cost = 0, int(lengths[row])
        batches[-1].append(row)
        tokens += cost
    return batches


def dealt_passes(
    rows: Sequence[int], lengths: np.ndarray, processes: int, *, most_rows: int, most_tokens: int | None, padded: bool
) -> list[list[list[int]]]:
    """The forward passes of each process: `micro_batches` of what `deal` gives it."""
    return [
        micro_batches(share, lengths, most_rows=most_rows, most_tokens=most_tokens, padded=padded)
        for share in deal(rows, lengths, processes)
    ]


def own_passes(shares: Sequence[Sequence[list[int]]], process: int, *, even: bool) -> list[tuple[list[int], float]]:
    """The passes of one process of `dealt_passes`, each with weight 1.

    `even`: every process runs equally many, as it must where layers are gathered from all of them for each pass; one
    that has fewer repeats a pass with weight 0.
    """
    mine = [(rows, 1.0) for rows in shares[process]]
    missing = max(map(len, shares)) - len(mine) if even else 0
    return mine + [(rows, 0.0) for rows in next((share[:1] for share in shares if share), [])] * missing


def grouped(passes: Sequence[list[int]], cost: Callable[[Sequence[int]], float], most: float) -> list[list[list[int]]]:
    """Passes, in their order, in groups that cost at most `most` together; one that costs more is alone."""
    groups: list[list[list[int]]] = []
    total = 0.0
    for rows in passes:
        if not groups or total + cost(rows) > most:
            groups.append([])
            total = 0.0
        groups[-1].append(rows)
        total += cost(rows)
    return groups


def token_budget(wanted: int | None, device: str) -> int:
    """Tokens of one forward pass without autograd: `wanted`, or what suits the kind of device ("cpu", "cuda")."""
    return wanted or BATCH_TOKENS.get(device, BATCH_TOKENS["cuda"])


def token_batches(lengths: Sequence[int] | np.ndarray, most_tokens: int, *, padded: bool) -> list[list[int]]:
    """Rows of each forward pass of at most `most_tokens`; a longer row makes a pass of its own.

    The longest come first, so that a pass that is too large for memory fails at once. `padded` as in `micro_batches`.
    """
    costs = np.asarray(lengths, dtype=np.int64)
    order = [int(row) for row in np.argsort(-costs, kind="stable")]
    return micro_batches(order, costs, most_rows=len(order), most_tokens=most_tokens, padded=padded)


class Batches:
    """Endless batches of a fixed size; an epoch leaves out the rows that do not fill its last batch.

    `grouping` as in `steps`: next to no padding, and every row as often as any other.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int, grouping: int = 1) -> None:
        self._lengths, self._size, self._seed, self._grouping = np.asarray(lengths), batch_size, seed, grouping
        self._per_epoch = len(lengths) // batch_size
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def at(self, step: int) -> list[int]:
        """Rows of a step (from 0), the longest first."""
        epoch, index = divmod(step, self._per_epoch)
        if self._epoch[0] != epoch:
            order = epoch_order(len(self._lengths), epoch, self._seed)[: self._per_epoch * self._size]
            self._epoch = epoch, _batches(order, self._lengths, self._size, epoch, self._seed, self._grouping)
        return sorted(self._epoch[1][index].tolist(), key=lambda row: (-self._lengths[row], row))


def parts(rows: Sequence[T], size: int) -> list[list[T]]:
    """Rows cut, in their order, into forward passes of at most `size`."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
