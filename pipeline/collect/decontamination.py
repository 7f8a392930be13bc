"""Rows that share words with the evaluation's texts.

A row is contaminated if it shares a run of `ngram` words with an evaluation text, ignoring case and symbols; a shorter
row if an evaluation text has exactly its words. The evaluation may have millions of texts: they stream past a Bloom
filter of the rows' n-grams, and its hits are compared with the n-grams themselves, 64 bits each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from pipeline.collect.ngrams import Hashes, TokenFile, TokenHasher, ngrams, words_of
from pipeline.collect.spill import Mask, Rows
from pipeline.core.config import Params

_BITS_PER_NGRAM = 16
_MOST_BITS = 2**31  # 256 MiB
_MERGE_ABOVE = 4_000_000  # hashes of the texts, before duplicates among them are merged


class DecontaminateParams(Params):
    """What counts as shared with the evaluation."""

    ngram: int = Field(default=13, ge=1, description="words in a row")


@dataclass(frozen=True)
class Contamination:
    """Contaminated rows, and the text that each shares words with.

    Attributes:
        rows: row numbers, int64 [M].
        positions: number of the row's word at which its first shared n-gram starts, int64 [M].
        tasks: the first task with that n-gram, an index into `names`, int64 [M].
        texts: number of evaluation texts read.
    """

    rows: Rows
    positions: Rows
    tasks: Rows
    names: list[str]
    texts: int


class BloomFilter:
    """A Bloom filter, sized for `expected` hashes: no false negatives, few false positives."""

    def __init__(self, expected: int) -> None:
        bits = min(_MOST_BITS, 1 << max(16, (max(expected, 1) * _BITS_PER_NGRAM - 1).bit_length()))
        self._last = np.uint64(bits - 1)
        self._bytes = np.zeros(bits // 8, np.uint8)

    def add(self, hashes: Hashes) -> None:
        for probe in self._probes(hashes):
            np.bitwise_or.at(self._bytes, probe >> np.uint64(3), _bit(probe))

    def has(self, hashes: Hashes) -> Mask:
        """Which of the hashes may have been added: bool [T]."""
        first, second = (self._bytes[probe >> np.uint64(3)] & _bit(probe) for probe in self._probes(hashes))
        return (first != 0) & (second != 0)

    def _probes(self, hashes: Hashes) -> tuple[Hashes, Hashes]:
        return hashes & self._last, (hashes >> np.uint64(33)) & self._last


def _bit(probe: Hashes) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.uint8(1) << (probe & np.uint64(7)).astype(np.uint8)


def find_contaminated(tokens: TokenFile, texts: Iterable[tuple[str, Sequence[str]]], *, ngram: int) -> Contamination:
    """The rows that share an n-gram with a text; `texts` are batches, each with the name of its task."""
    known = BloomFilter(sum(max(int(batch.offsets[-1]), 1) for _, batch in tokens.batches()))
    for _, batch in tokens.batches():
        known.add(ngrams(batch.words(), ngram).hashes)
    shared, tasks, names, count = _hits(known, texts, ngram)
    empty = np.zeros(0, np.int64)
    rows, positions, found = [empty], [empty], [empty]
    for start, batch in tokens.batches() if len(shared) else ():
        grams = ngrams(batch.words(), ngram)
        at = np.minimum(np.searchsorted(shared, grams.hashes), len(shared) - 1)
        hits = np.flatnonzero(shared[at] == grams.hashes)
        owners, first = np.unique(grams.owners()[hits], return_index=True)
        rows.append(tokens.rows[start + owners])
        positions.append(hits[first] - grams.offsets[owners])
        found.append(tasks[at[hits[first]]])
    return Contamination(np.concatenate(rows), np.concatenate(positions), np.concatenate(found), names, count)


def _hits(
    known: BloomFilter, texts: Iterable[tuple[str, Sequence[str]]], ngram: int
) -> tuple[Hashes, Rows, list[str], int]:
    """The texts' n-grams that the filter has, sorted; the first task of each; all task names; the number of texts."""
    hasher, numbers, count = TokenHasher(), dict[str, int](), 0
    hashes, tasks = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for name, batch in texts:
        count += len(batch)
        grams = ngrams(hasher(batch).words(), ngram).hashes
        hashes.append(np.unique(grams[known.has(grams)]))
        tasks.append(np.full(len(hashes[-1]), numbers.setdefault(name, len(numbers)), np.int64))
        if sum(map(len, hashes[1:])) > _MERGE_ABOVE:
            hashes, tasks = _merge(hashes, tasks)
    (distinct,), (first,) = _merge(hashes, tasks)
    return distinct, first, list(numbers), count


def _merge(hashes: list[Hashes], tasks: list[Rows]) -> tuple[list[Hashes], list[Rows]]:
    distinct, first = np.unique(np.concatenate(hashes), return_index=True)
    return [distinct], [np.concatenate(tasks)[first]]


def shared_words(text: str, position: int, ngram: int) -> str:
    """The n-gram of a text that starts at its word number `position`."""
    return " ".join(words_of(text)[position : position + ngram])
