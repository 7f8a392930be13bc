"""Rows that nearly repeat an earlier one: MinHash finds candidates, the exact Jaccard similarity decides.

Two rows are compared by their sets of token n-grams, in which symbols count (2+2 is not 2-2) and case does not. Rows
that share a band of their MinHash signatures are candidates; of those whose signatures agree too little to be near
duplicates most are dropped, and the rest are compared exactly. A row shorter than the n-gram is one n-gram, so that it
is a near duplicate only of a row with the very same tokens.

Rows are taken in order, and a row goes if an earlier row that *stayed* is similar enough: what is appended to a corpus
changes nothing that was decided before. MinHash misses a pair at the threshold with a chance of about 0.2 %, and one
above it with less. Time is linear in rows: a row meets at most the first `REPRESENTATIVES` that stayed of each bucket,
so of a template with hundreds of variants some near duplicates remain.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.collect.ngrams import Hashes, WordFile, Words, mixed, ngrams, without
from pipeline.collect.spill import Mask, Rows
from pipeline.core.config import Params

SEED = 42
MISSED = 1e-3
REPRESENTATIVES = 64
_DEVIATIONS = 3  # of the signatures' estimate, below the threshold: misses 0.13 % of pairs at it


class NearDuplicateParams(Params):
    """How similar is too similar."""

    threshold: float = Field(default=0.9, ge=0.5, le=1, description="Jaccard similarity of the n-gram sets")
    ngram: int = Field(default=5, ge=1, description="tokens: words, and symbols by themselves")
    permutations: int = Field(default=128, ge=32, le=512, description="length of the MinHash signatures")


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of row numbers.

    Attributes:
        rows: rows that go, int64 [M], ascending.
        kept: for each, the earliest row that stayed and is similar, int64 [M].
        similarity: their exact Jaccard similarity, float64 [M].
    """

    rows: Rows
    kept: Rows
    similarity: np.ndarray[Any, np.dtype[np.float64]]


def library() -> dict[str, Any]:
    """What determines the signatures besides params."""
    from rensa import RMinHash

    return {"library": "rensa", "algorithm_version": RMinHash.ALGORITHM_VERSION}


def find(words: WordFile, skipped: Mask, params: NearDuplicateParams) -> NearDuplicates:
    """The near duplicates among the rows of a file of words.

    Args:
        words: of rows in any order; their row numbers say which is earlier.
        skipped: bool [N], by position in `words`: rows that take no part.
        params: similarity and signatures.
    """
    sketches, keys = _signatures(words, skipped, params)
    taking = np.flatnonzero(~skipped)
    candidates = taking[_shares_a_bucket(keys, taking)]
    candidates = candidates[np.argsort(words.rows[candidates])]
    buckets = _bucket_numbers(keys, candidates)
    del keys
    shingles = lru_cache(4096)(lambda position: np.unique(ngrams(words.at(position), params.ngram).hashes))
    pairs = list(_greedy(candidates, buckets, sketches, shingles, params))
    columns = zip(*pairs, strict=True) if pairs else ((), (), ())
    gone, kept, similarity = columns
    return NearDuplicates(
        words.rows[np.array(gone, dtype=np.int64)],
        words.rows[np.array(kept, dtype=np.int64)],
        np.array(similarity, dtype=np.float64),
    )


def band_rows(threshold: float, permutations: int) -> int:
    """Signature slots a band: the most that miss a pair at the threshold with a chance of at most `MISSED`."""
    for rows in range(permutations, 1, -1):
        if (1 - threshold**rows) ** (permutations // rows) <= MISSED:
            return rows
    return 1


def _signatures(words: WordFile, skipped: Mask, params: NearDuplicateParams) -> tuple[np.ndarray[Any, Any], Hashes]:
    """The lowest byte of each signature slot, uint8 [N, permutations], and the band keys, uint64 [N, bands]."""
    width = band_rows(params.threshold, params.permutations)
    bands = params.permutations // width
    sketches = np.empty((len(words), params.permutations), np.uint8)
    keys = np.empty((len(words), bands), np.uint64)
    for start, batch in words.batches():
        stop = start + len(batch.offsets) - 1
        signatures = _minhash(ngrams(without(batch, skipped[start:stop]), params.ngram), params.permutations)
        sketches[start:stop] = signatures.astype(np.uint8)
        keys[start:stop] = _band_keys(signatures[:, : bands * width].reshape(len(signatures), bands, width))
    return sketches, keys


def _minhash(shingles: Words, permutations: int) -> np.ndarray[Any, Any]:
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles.hashes, shingles.offsets.astype(np.uint64), permutations, SEED
    )
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(-1, permutations)


def _band_keys(bands: np.ndarray[Any, Any]) -> Hashes:
    keys = np.zeros(bands.shape[:2], np.uint64)
    for slot in range(bands.shape[2]):
        keys = mixed(keys ^ bands[:, :, slot]) + np.uint64(slot)
    return keys


def _shares_a_bucket(keys: Hashes, positions: Rows) -> Mask:
    """Which of the positions have a band key in common with another: bool [len(positions)]."""
    shares = np.zeros(len(positions), bool)
    for band in range(keys.shape[1]):
        column = keys[positions, band]
        order = np.argsort(column)
        twins = np.flatnonzero(column[order][1:] == column[order][:-1])
        shares[order[twins]] = True
        shares[order[twins + 1]] = True
    return shares


def _bucket_numbers(keys: Hashes, positions: Rows) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each position and band a number that the same key of the same band has: int64 [len(positions), bands]."""
    numbers = np.empty((len(positions), keys.shape[1]), np.int64)
    first = 0
    for band in range(keys.shape[1]):
        distinct, inverse = np.unique(keys[positions, band], return_inverse=True)
        numbers[:, band] = first + inverse
        first += len(distinct)
    return numbers


def _greedy(
    candidates: Rows,
    buckets: np.ndarray[Any, Any],
    sketches: np.ndarray[Any, Any],
    shingles: Callable[[int], Hashes],
    params: NearDuplicateParams,
) -> Iterable[tuple[int, int, float]]:
    """(position, kept position, similarity) of every candidate that nearly repeats one before it that stays."""
    t = params.threshold
    floor = params.permutations * t - _DEVIATIONS * (params.permutations * t * (1 - t)) ** 0.5
    kept: dict[int, list[int]] = {}  # by bucket, places in `candidates`, so in order of the rows
    for order, (position, numbers) in enumerate(zip(candidates, buckets, strict=True)):
        numbers = numbers.tolist()
        earlier = candidates[np.array(_met(kept, numbers), dtype=np.int64)]
        agreeing = np.count_nonzero(sketches[earlier] == sketches[position], axis=1) >= floor
        compared = ((int(other), jaccard(shingles(int(other)), shingles(int(position)))) for other in earlier[agreeing])
        found = next(((other, similarity) for other, similarity in compared if similarity >= t), None)
        if found is not None:
            yield int(position), *found
            continue
        for number in numbers:
            bucket = kept.setdefault(number, [])
            if len(bucket) < REPRESENTATIVES:
                bucket.append(order)


def _met(kept: Mapping[int, list[int]], numbers: Iterable[int]) -> list[int]:
    """Places of those that stayed in one of these buckets, rising: at most `REPRESENTATIVES` a bucket."""
    return sorted(set(chain.from_iterable(kept.get(number, ()) for number in numbers)))


def jaccard(first: Hashes, second: Hashes) -> float:
    """Similarity of two sets, each sorted and without repetitions."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
