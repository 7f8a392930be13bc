"""Rows that share words with the evaluation's texts.

A row is contaminated if it has a run of `ngram` words in common with an evaluation text, case and symbols aside; a row
of fewer words if an evaluation text has exactly its words. The evaluation may hold millions of texts: they stream past
a Bloom filter of the rows' n-grams, and what it lets through is held against the n-grams themselves, 64 bits each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from pipeline.collect.ngrams import Hashes, WordFile, WordHasher, ngrams, words_of
from pipeline.collect.spill import Rows
from pipeline.core.config import Params

_BITS_PER_NGRAM = 16
_MOST_BITS = 2**31  # 256 MiB
_COMPACT = 4_000_000


class DecontaminateParams(Params):
    """What counts as shared with the evaluation."""

    ngram: int = Field(default=13, ge=1, description="words in a row")


@dataclass(frozen=True)
class Contaminated:
    """Rows to remove, and why.

    Attributes:
        rows: row numbers, int64 [M].
        places: number of the first shared n-gram's first word in its row, int64 [M].
        tasks: which text was met first, an index into `names`, int64 [M].
        names: of the evaluation's parts.
        texts: number of evaluation texts read.
    """

    rows: Rows
    places: Rows
    tasks: Rows
    names: list[str]
    texts: int


class BloomFilter:
    """A set of hashes in a few bits each: never forgets one, and takes few others for one of its own."""

    def __init__(self, expected: int) -> None:
        """Room for `expected` hashes."""
        bits = min(_MOST_BITS, 1 << max(16, (max(expected, 1) * _BITS_PER_NGRAM - 1).bit_length()))
        self._last = np.uint64(bits - 1)
        self._bytes = np.zeros(bits // 8, np.uint8)

    def add(self, hashes: Hashes) -> None:
        """Add hashes."""
        for probe in self._probes(hashes):
            np.bitwise_or.at(self._bytes, probe >> np.uint64(3), _bit(probe))

    def has(self, hashes: Hashes) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Which of the hashes may be among those added: bool [T]."""
        first, second = (self._bytes[probe >> np.uint64(3)] & _bit(probe) for probe in self._probes(hashes))
        return (first != 0) & (second != 0)

    def _probes(self, hashes: Hashes) -> tuple[Hashes, Hashes]:
        return hashes & self._last, (hashes >> np.uint64(33)) & self._last


def _bit(probe: Hashes) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.uint8(1) << (probe & np.uint64(7)).astype(np.uint8)


def find(words: WordFile, texts: Iterable[tuple[str, Sequence[str]]], *, ngram: int) -> Contaminated:
    """The rows that share an n-gram with a text.

    Args:
        words: of the rows.
        texts: batches of the evaluation's texts with the name of the part that they belong to.
        ngram: words.
    """
    total = sum(max(int(batch.offsets[-1]), 1) for _, batch in words.batches())
    known = BloomFilter(total)
    for _, batch in words.batches():
        known.add(ngrams(batch.without_symbols(), ngram).hashes)
    met, tasks, names, count = _met(known, texts, ngram)
    empty = np.zeros(0, np.int64)
    rows, places, found = [empty], [empty], [empty]
    for start, batch in words.batches() if len(met) else ():
        grams = ngrams(batch.without_symbols(), ngram)
        at = np.minimum(np.searchsorted(met, grams.hashes), len(met) - 1)
        hits = np.flatnonzero(met[at] == grams.hashes)
        owners, first = np.unique(grams.owners()[hits], return_index=True)
        rows.append(words.rows[start + owners])
        places.append(hits[first] - grams.offsets[owners])
        found.append(tasks[at[hits[first]]])
    return Contaminated(np.concatenate(rows), np.concatenate(places), np.concatenate(found), names, count)


def _met(
    known: BloomFilter, texts: Iterable[tuple[str, Sequence[str]]], ngram: int
) -> tuple[Hashes, Rows, list[str], int]:
    """The texts' n-grams that may be known, sorted, and for each the part in which it was met first."""
    hasher, numbers, count = WordHasher(), dict[str, int](), 0
    hashes, tasks = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for name, batch in texts:
        count += len(batch)
        number = numbers.setdefault(name, len(numbers))
        grams = ngrams(hasher(batch).without_symbols(), ngram).hashes
        hashes.append(np.unique(grams[known.has(grams)]))
        tasks.append(np.full(len(hashes[-1]), number, np.int64))
        if sum(map(len, hashes[1:])) > _COMPACT:
            hashes, tasks = _merged(hashes, tasks)
    (met,), (parts,) = _merged(hashes, tasks)
    return met, parts, list(numbers), count


def _merged(hashes: list[Hashes], tasks: list[Rows]) -> tuple[list[Hashes], list[Rows]]:
    distinct, first = np.unique(np.concatenate(hashes), return_index=True)
    return [distinct], [np.concatenate(tasks)[first]]


def shared_words(text: str, place: int, ngram: int) -> str:
    """The n-gram of a text that starts at its word number `place`."""
    return " ".join(words_of(text)[place : place + ngram])
