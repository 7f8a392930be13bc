"""Rows that nearly repeat an earlier one: MinHash finds candidates, the exact Jaccard similarity decides.

Rows are compared by their sets of token n-grams; symbols count (2+2 is not 2-2), case does not. A row shorter than the
n-gram is one n-gram, so only a row with the same tokens is similar to it.

In reading order, a row goes if an earlier row that *stays* is similar enough: appending to a corpus changes no earlier
decision. MinHash misses a pair at the threshold with probability 0.2 %, a more similar pair with less. A row is
compared with at most the first `REPRESENTATIVES` rows that stay of each bucket: time is linear in rows, and some near
duplicates remain of a template with hundreds of variants.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
from pydantic import Field

from pipeline.collect.ngrams import Hashes, HashRows, TokenFile, mix, ngrams
from pipeline.collect.spill import Mask, Rows
from pipeline.core.config import Params

SEED = 42
MISSED = 1e-3  # probability, at most, that no band of a pair at the threshold agrees
REPRESENTATIVES = 64
_DEVIATIONS = 3  # of the signatures' estimate, below the threshold: misses 0.13 % of pairs at it


class NearDuplicateParams(Params):
    """How similar is too similar."""

    threshold: float = Field(default=0.9, ge=0.5, le=1, description="Jaccard similarity of the n-gram sets")
    ngram: int = Field(default=5, ge=1, description="tokens: words, and symbols by themselves")
    permutations: int = Field(default=128, ge=32, le=512, description="length of the MinHash signatures")


@dataclass(frozen=True)
class NearDuplicates:
    """Near duplicates by row number: `rows` that go, int64 [M], ascending.

    `originals` are the earliest similar rows that stay, int64 [M]; `similarity` is exact, float64 [M].
    """

    rows: Rows
    originals: Rows
    similarity: np.ndarray[Any, np.dtype[np.float64]]


def library() -> dict[str, Any]:
    from rensa import RMinHash

    return {"library": "rensa", "algorithm_version": RMinHash.ALGORITHM_VERSION}


def find_near_duplicates(tokens: TokenFile, skipped: Mask, params: NearDuplicateParams) -> NearDuplicates:
    """The near duplicates among the rows of a token file; the row numbers give the order.

    `skipped` rows are not compared, bool [N], by position in `tokens`.
    """
    sketches, keys = _signatures(tokens, skipped, params)
    positions = np.flatnonzero(~skipped)
    candidates = positions[_shares_a_bucket(keys, positions)]
    candidates = candidates[np.argsort(tokens.rows[candidates])]
    buckets = _bucket_numbers(keys, candidates)
    del keys
    shingles = lru_cache(4096)(lambda position: np.unique(ngrams(tokens.at(position), params.ngram).hashes))
    pairs = list(_greedy(candidates, buckets, sketches, shingles, params))
    repeats, originals, similarity = zip(*pairs, strict=True) if pairs else ((), (), ())
    return NearDuplicates(
        tokens.rows[np.array(repeats, dtype=np.int64)],
        tokens.rows[np.array(originals, dtype=np.int64)],
        np.array(similarity, dtype=np.float64),
    )


def band_rows(threshold: float, permutations: int) -> int:
    """Signature slots a band: the most that miss a pair at the threshold with probability `MISSED` or less."""
    for rows in range(permutations, 1, -1):
        if (1 - threshold**rows) ** (permutations // rows) <= MISSED:
            return rows
    return 1


def _signatures(tokens: TokenFile, skipped: Mask, params: NearDuplicateParams) -> tuple[np.ndarray[Any, Any], Hashes]:
    """The lowest byte of each signature slot, uint8 [N, permutations], and the band keys, uint64 [N, bands]."""
    width = band_rows(params.threshold, params.permutations)
    bands = params.permutations // width
    sketches = np.empty((len(tokens), params.permutations), np.uint8)
    keys = np.empty((len(tokens), bands), np.uint64)
    for start, batch in tokens.batches():
        stop = start + len(batch.offsets) - 1
        signatures = _minhash(ngrams(batch.without(skipped[start:stop]), params.ngram), params.permutations)
        sketches[start:stop] = signatures.astype(np.uint8)
        keys[start:stop] = _band_keys(signatures[:, : bands * width].reshape(len(signatures), bands, width))
    return sketches, keys


def _minhash(shingles: HashRows, permutations: int) -> np.ndarray[Any, Any]:
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles.hashes, shingles.offsets.astype(np.uint64), permutations, SEED
    )
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(-1, permutations)


def _band_keys(bands: np.ndarray[Any, Any]) -> Hashes:
    keys = np.zeros(bands.shape[:2], np.uint64)
    for slot in range(bands.shape[2]):
        keys = mix(keys ^ bands[:, :, slot]) + np.uint64(slot)
    return keys


def _shares_a_bucket(keys: Hashes, positions: Rows) -> Mask:
    """Which of the positions have a band key in common with another: bool [len(positions)]."""
    shares = np.zeros(len(positions), bool)
    for band in range(keys.shape[1]):
        _, inverse, counts = np.unique(keys[positions, band], return_inverse=True, return_counts=True)
        shares |= counts[inverse] > 1
    return shares


def _bucket_numbers(keys: Hashes, positions: Rows) -> Rows:
    """A number of each band key, distinct across bands: int64 [len(positions), bands]."""
    numbers = np.empty((len(positions), keys.shape[1]), np.int64)
    first = 0
    for band in range(keys.shape[1]):
        distinct, inverse = np.unique(keys[positions, band], return_inverse=True)
        numbers[:, band] = first + inverse
        first += len(distinct)
    return numbers


def _greedy(
    candidates: Rows,
    buckets: Rows,
    sketches: np.ndarray[Any, Any],
    shingles: Callable[[int], Hashes],
    params: NearDuplicateParams,
) -> Iterable[tuple[int, int, float]]:
    """(position, position of its original, similarity) of every candidate that nearly repeats an earlier one."""
    t = params.threshold
    floor = params.permutations * t - _DEVIATIONS * (params.permutations * t * (1 - t)) ** 0.5
    representatives: dict[int, list[int]] = {}  # by bucket, indices into `candidates`, so in order of the rows
    for index, (position, numbers) in enumerate(zip(candidates, buckets, strict=True)):
        numbers = numbers.tolist()
        earlier = candidates[np.array(_in_buckets(representatives, numbers), dtype=np.int64)]
        agreeing = np.count_nonzero(sketches[earlier] == sketches[position], axis=1) >= floor
        compared = ((int(other), jaccard(shingles(int(other)), shingles(int(position)))) for other in earlier[agreeing])
        found = next(((other, similarity) for other, similarity in compared if similarity >= t), None)
        if found is not None:
            yield int(position), *found
            continue
        for number in numbers:
            bucket = representatives.setdefault(number, [])
            if len(bucket) < REPRESENTATIVES:
                bucket.append(index)


def _in_buckets(representatives: Mapping[int, list[int]], numbers: Iterable[int]) -> list[int]:
    """The representatives of these buckets, ascending: at most `REPRESENTATIVES` a bucket."""
    return sorted(set(chain.from_iterable(representatives.get(number, ()) for number in numbers)))


def jaccard(first: Hashes, second: Hashes) -> float:
    """Similarity of two sets, each sorted and without repetitions."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)
