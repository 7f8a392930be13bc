"""Texts as 64-bit hashes of their tokens, and n-grams of these.

A token is a run of letters, marks and digits, case folded; in scripts written without spaces, one character. Any other
visible character is a symbol, a token of its own. A hash depends on the token alone: not on the machine, the process or
a library's version. Two different n-grams have the same hash with probability 2^-64.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.collect.spill import Mask, Rows
from pipeline.core.files import disk_errors

Hashes = np.ndarray[Any, np.dtype[np.uint64]]

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_TOKEN = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+|\S"
_IS_WORD = r"^[\p{L}\p{M}\p{N}]"
_WORD_BIT = np.uint64(1)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying is invertible
_CACHED_TOKENS = 500_000  # about 60 MB
# Rows that are read together: about so many tokens, and at most so many rows, since MinHash takes 5 KB for each.
BATCH_TOKENS, BATCH_ROWS = 2**20, 2**13


@dataclass(frozen=True)
class HashRows:
    """Hashes of several rows, one after another.

    Attributes:
        hashes: uint64 [T]; of a token, the lowest bit is set if it is a word.
        offsets: int64 [N + 1]: row i is `hashes[offsets[i] : offsets[i + 1]]`.
    """

    hashes: Hashes
    offsets: Rows

    def owners(self) -> Rows:
        """The row of each hash: int64 [T]."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def words(self) -> "HashRows":
        """The rows without symbols."""
        return self._select((self.hashes & _WORD_BIT).astype(bool))

    def without(self, dropped: Mask) -> "HashRows":
        """The rows with those that `dropped` (bool [N]) marks empty."""
        return self._select(~dropped[self.owners()])

    def _select(self, chosen: Mask) -> "HashRows":
        return HashRows(self.hashes[chosen], _offsets(chosen)[self.offsets])


def _offsets(lengths: np.ndarray[Any, Any]) -> Rows:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def tokens(texts: Sequence[str] | pl.Series) -> pl.Series:
    """The tokens of each text: a list column."""
    folded = pl.Series([text.casefold() for text in texts], dtype=pl.String)
    return folded.str.extract_all(_TOKEN)


def words_of(text: str) -> list[str]:
    """The tokens of one text that are no symbols."""
    found = tokens([text]).explode(empty_as_null=False)
    return found.filter(found.str.contains(_IS_WORD)).to_list()


class TokenHasher:
    """Hashes the tokens of texts; known tokens are cached."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, texts: Sequence[str] | pl.Series) -> HashRows:
        found = tokens(texts)
        encoded = found.explode(empty_as_null=False).to_arrow().dictionary_encode()
        distinct = self._hashes(pl.Series(encoded.dictionary, dtype=pl.String))
        hashes = distinct[encoded.indices.to_numpy(zero_copy_only=False)]
        return HashRows(hashes, _offsets(found.list.len().to_numpy()))

    def _hashes(self, distinct: pl.Series) -> Hashes:
        if len(self._known) > _CACHED_TOKENS:
            self._known.clear()
        for token, is_word in zip(distinct, distinct.str.contains(_IS_WORD), strict=True):
            if token not in self._known:
                self._known[token] = _token_hash(token, is_word)
        return np.array([self._known[token] for token in distinct], dtype=np.uint64)


def _token_hash(token: str, is_word: bool) -> int:
    digest = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")
    return digest | 1 if is_word else digest & ~1


def mix(values: Hashes) -> Hashes:
    """The finaliser of splitmix64: each bit of a value affects all bits of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngrams(rows: HashRows, n: int) -> HashRows:
    """Hashes of all runs of `n` tokens; a shorter row has one, of all its tokens; an empty row has none."""
    lengths = np.diff(rows.offsets)
    counts = np.where(lengths >= n, lengths - n + 1, np.minimum(lengths, 1))
    offsets = _offsets(counts)
    starts = np.arange(offsets[-1]) + np.repeat(rows.offsets[:-1] - offsets[:-1], counts)
    padded = np.concatenate([rows.hashes, np.zeros(n, np.uint64)])
    hashes = _combine(padded[k : k + len(rows.hashes)] for k in range(n))[starts]
    short = np.flatnonzero((lengths > 0) & (lengths < n))
    first, ends = rows.offsets[short], lengths[short]
    hashes[offsets[short]] = _combine(np.where(k < ends, padded[first + k], np.uint64(0)) for k in range(n))
    return HashRows(mix(hashes), offsets)


def _combine(tokens: Iterable[Hashes]) -> Hashes:
    """Hashes of sequences, given as the first token of each, the second of each, ..."""
    return reduce(lambda hashes, each: hashes * _MULTIPLIER + each, tokens, np.zeros(1, np.uint64))


class TokenFile:
    """Token hashes of many rows on disk; in memory 16 bytes a row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(path):
            self._file = path.open("w+b", buffering=0)
        self._rows: list[Rows] = []
        self._ends: list[Rows] = [np.zeros(1, np.int64)]

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._path.parent

    def append(self, rows: Rows, hashes: HashRows) -> None:
        """Add rows under their numbers; raises WorkError if the disk is full."""
        with disk_errors(self._path):
            content = hashes.hashes.data.cast("B")
            while content:
                content = content[self._file.write(content) :]
        self._ends.append(self._ends[-1][-1] + hashes.offsets[1:])
        self._rows.append(rows)

    def finish(self) -> None:
        """End writing; reading starts here."""
        self._rows = [np.concatenate(self._rows) if self._rows else np.zeros(0, np.int64)]
        self._ends = [np.concatenate(self._ends)]

    def close(self) -> None:
        self._file.close()

    @property
    def rows(self) -> Rows:
        """Row numbers by position in the file, int64 [N]."""
        return self._rows[0]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, position: int) -> HashRows:
        return self._read(position, position + 1)

    def batches(self) -> Iterator[tuple[int, HashRows]]:
        """All rows in pieces (`BATCH_TOKENS`, `BATCH_ROWS`), each with the position of its first row."""
        start = 0
        while start < len(self):
            stop = int(np.searchsorted(self._ends[0], self._ends[0][start] + BATCH_TOKENS, side="left"))
            stop = min(max(stop, start + 1), start + BATCH_ROWS, len(self))
            yield start, self._read(start, stop)
            start = stop

    def _read(self, start: int, stop: int) -> HashRows:
        ends = self._ends[0][start : stop + 1]
        self._file.seek(ends[0] * 8)
        hashes = np.empty(int(ends[-1] - ends[0]), np.uint64)
        content = hashes.data.cast("B")
        while content and (count := self._file.readinto(content)):
            content = content[count:]
        return HashRows(hashes, ends - ends[0])
