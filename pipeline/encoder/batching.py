"""Which rows go through the backbone together: optimiser steps, and the forward passes that a step is made of."""

from collections.abc import Iterator, Sequence

import numpy as np


def epoch_order(rows: int, epoch: int, seed: int) -> np.ndarray:
    """A permutation of the rows that depends on seed and epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def steps(
    lengths: np.ndarray, batch_size: int, epochs: int, *, most: int | None, seed: int, grouping: int = 1
) -> Iterator[list[int]]:
    """Row indices of each optimiser step; one batch of an epoch may be smaller.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a step.
        epochs: times that every row is seen.
        most: steps after which to stop.
        seed: of the order; the same seed gives the same steps.
        grouping: the rows of this many random batches are sorted by length before they are cut into batches, whose
            order is then shuffled over the epoch: rows of like length meet, lengths come in random order. 1: none.
    """
    taken = 0
    for epoch in range(epochs):
        for batch in _epoch(lengths, batch_size, epoch, seed, grouping):
            if taken == most:
                return
            yield batch
            taken += 1


def _epoch(lengths: np.ndarray, batch_size: int, epoch: int, seed: int, grouping: int) -> list[list[int]]:
    order = epoch_order(len(lengths), epoch, seed)
    if grouping == 1:
        return _cut(order, batch_size)
    groups = _cut(order, batch_size * grouping)
    batches = [
        batch for group in groups for batch in _cut(sorted(group, key=lambda row: (lengths[row], row)), batch_size)
    ]
    return [batches[at] for at in epoch_order(len(batches), epoch, seed)]


def _cut(rows: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    return [list(map(int, rows[start : start + size])) for start in range(0, len(rows), size)]


def deal(rows: Sequence[int], lengths: np.ndarray, processes: int) -> list[list[int]]:
    """The rows of a step, shared out over processes so that each gets about as many tokens; longest rows first."""
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    return [ordered[first::processes] for first in range(processes)]


def micro_batches(
    rows: Sequence[int], lengths: np.ndarray, *, most_rows: int, most_tokens: int | None, padded: bool
) -> list[list[int]]:
    """Rows cut, in their order, into forward passes.

    Args:
        rows: as `deal` gives them, longest first.
        lengths: tokens of each row of the corpus.
        most_rows: rows of a pass, where there is no token budget.
        most_tokens: tokens of a pass. A row that is longer by itself makes a pass of its own.
        padded: every row of a pass takes the tokens of the longest.
    """
    if most_tokens is None:
        return _cut(rows, most_rows)
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
