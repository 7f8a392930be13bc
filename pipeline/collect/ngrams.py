"""Texts as 64-bit hashes of their words, and n-grams of these.

A token is a run of letters, marks and digits, case folded; in scripts that are written without spaces, one character;
any other visible character is a symbol, a token of its own. Hashes depend on the token alone: not on the machine, the
process or a library's version. Two different n-grams have the same hash with a chance of 2^-64.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.collect.spill import Mask, Rows
from pipeline.core.artifacts import disk_errors

Hashes = np.ndarray[Any, np.dtype[np.uint64]]

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_TOKEN = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+|\S"
_IS_WORD = r"^[\p{L}\p{M}\p{N}]"
_WORD_BIT = np.uint64(1)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing
_REMEMBERED = 500_000  # hashes of distinct tokens, about 60 MB
BATCH_WORDS = 2**20


@dataclass(frozen=True)
class Words:
    """Hashes of several rows, one after another.

    Attributes:
        hashes: uint64 [T]; of tokens, the lowest bit is set where the token is a word.
        offsets: int64 [N + 1]: row i is `hashes[offsets[i] : offsets[i + 1]]`.
    """

    hashes: Hashes
    offsets: Rows

    def without_symbols(self) -> "Words":
        """The words alone."""
        kept = (self.hashes & _WORD_BIT).astype(bool)
        before = np.concatenate([[0], np.cumsum(kept)])
        return Words(self.hashes[kept], before[self.offsets])

    def owners(self) -> Rows:
        """For each hash, the row it belongs to: int64 [T]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


def tokens(texts: Sequence[str] | pl.Series) -> pl.Series:
    """The tokens of each text: a list column."""
    folded = pl.Series([text.casefold() for text in texts], dtype=pl.String)
    return folded.str.extract_all(_TOKEN)


def words_of(text: str) -> list[str]:
    """The words of one text, without its symbols."""
    found = tokens([text]).explode(empty_as_null=False)
    return found.filter(found.str.contains(_IS_WORD)).to_list()


class WordHasher:
    """Hashes the tokens of texts; remembers those it has seen."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, texts: Sequence[str] | pl.Series) -> Words:
        """The token hashes of `texts`."""
        found = tokens(texts)
        offsets = np.concatenate([[0], np.cumsum(found.list.len().to_numpy())]).astype(np.int64)
        encoded = found.explode(empty_as_null=False).to_arrow().dictionary_encode()
        distinct = self._hashes(pl.Series(encoded.dictionary, dtype=pl.String))
        return Words(distinct[encoded.indices.to_numpy(zero_copy_only=False)], offsets)

    def _hashes(self, distinct: pl.Series) -> Hashes:
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        for token, is_word in zip(distinct, distinct.str.contains(_IS_WORD), strict=True):
            if token not in self._known:
                self._known[token] = _token_hash(token, is_word)
        return np.array([self._known[token] for token in distinct], dtype=np.uint64)


def _token_hash(token: str, is_word: bool) -> int:
    digest = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")
    return digest | 1 if is_word else digest & ~1


def mixed(values: Hashes) -> Hashes:
    """The values with every bit of them spread over all bits (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngrams(words: Words, n: int) -> Words:
    """Hashes of all runs of `n` tokens; a row of fewer has one, of all its tokens; an empty row has none."""
    lengths = np.diff(words.offsets)
    counts = np.where(lengths >= n, lengths - n + 1, np.minimum(lengths, 1))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    starts = np.arange(offsets[-1]) + np.repeat(words.offsets[:-1] - offsets[:-1], counts)
    padded = np.concatenate([words.hashes, np.zeros(n, np.uint64)])
    whole = np.zeros(len(words.hashes), np.uint64)
    for k in range(n):
        whole = whole * _MULTIPLIER + padded[k : k + len(whole)]
    hashes = whole[starts]
    short = np.flatnonzero((lengths > 0) & (lengths < n))
    hashes[offsets[short]] = _short_rows(padded, words.offsets[short], lengths[short], n)
    return Words(mixed(hashes), offsets)


def _short_rows(padded: Hashes, starts: Rows, lengths: Rows, n: int) -> Hashes:
    hashes = np.zeros(len(starts), np.uint64)
    for k in range(n):
        hashes = hashes * _MULTIPLIER + np.where(k < lengths, padded[starts + k], np.uint64(0))
    return hashes


class WordFile:
    """Token hashes of many rows on disk; in memory 16 bytes a row."""

    def __init__(self, path: Path) -> None:
        """Start empty at `path`."""
        self._path = path
        with disk_errors(path):
            self._file = path.open("w+b", buffering=0)
        self._rows: list[Rows] = []
        self._ends: list[Rows] = [np.zeros(1, np.int64)]

    def append(self, rows: Rows, words: Words) -> None:
        """Add rows under their numbers.

        Raises:
            WorkError: the disk is full.
        """
        with disk_errors(self._path):
            content = words.hashes.data.cast("B")
            while content:
                content = content[self._file.write(content) :]
        self._ends.append(self._ends[-1][-1] + words.offsets[1:])
        self._rows.append(rows)

    def finish(self) -> None:
        """No more rows come."""
        self._rows = [np.concatenate(self._rows) if self._rows else np.zeros(0, np.int64)]
        self._ends = [np.concatenate(self._ends)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def rows(self) -> Rows:
        """Row numbers by position in the file, int64 [N]."""
        return self._rows[0]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, position: int) -> Words:
        """One row."""
        return self._read(position, position + 1)

    def batches(self) -> Iterator[tuple[int, Words]]:
        """All rows in pieces of about a million words, each with the position of its first row."""
        start = 0
        while start < len(self):
            stop = int(np.searchsorted(self._ends[0], self._ends[0][start] + BATCH_WORDS, side="left"))
            stop = min(max(stop, start + 1), len(self))
            yield start, self._read(start, stop)
            start = stop

    def _read(self, start: int, stop: int) -> Words:
        ends = self._ends[0][start : stop + 1]
        self._file.seek(ends[0] * 8)
        hashes = np.empty(int(ends[-1] - ends[0]), np.uint64)
        content = hashes.data.cast("B")
        while content and (count := self._file.readinto(content)):
            content = content[count:]
        return Words(hashes, ends - ends[0])


def without(words: Words, dropped: Mask) -> Words:
    """The rows without those that `dropped` (bool [N]) marks, whose place stays, empty."""
    lengths = np.where(dropped, 0, np.diff(words.offsets))
    kept = ~np.repeat(dropped, np.diff(words.offsets))
    return Words(words.hashes[kept], np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
