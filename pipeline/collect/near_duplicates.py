"""Rows that nearly repeat an earlier one: MinHash finds candidates, the exact Jaccard similarity decides.

Rows are compared by their sets of token n-grams; symbols count (2+2 is not 2-2), case does not. A row shorter than the
n-gram is one n-gram, so only a row with the same tokens is similar to it.

In reading order, a row goes if an earlier row that *stays* is similar enough: appending to a corpus changes no earlier
decision. MinHash misses a pair at the threshold with probability 0.2 %, a more similar pair with less. A row is
compared with at most the first `REPRESENTATIVES` rows that stay of each bucket: time is linear in rows, and some near
duplicates remain of a template with hundreds of variants.

Signatures lie in files. In memory are a byte a row, the keys of one band in part, and what belongs to the rows that
share a bucket with another.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from pydantic import Field

from pipeline.collect.ngrams import Hashes, HashRows, TokenFile, mix, ngrams
from pipeline.collect.spill import Mask, Rows
from pipeline.core.config import Params
from pipeline.core.files import disk_errors
from pipeline.core.run import progress
from pipeline.core.text import query_id

SEED = 42
MISSED = 1e-3  # probability, at most, that no band of a pair at the threshold agrees
REPRESENTATIVES = 64
_READ_ROWS = 2**16  # rows of a file of signatures in memory
_SORTED_KEYS = 2**22  # keys of a band that are sorted together
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
    """What decides the near duplicates found besides texts and params, for a manifest."""
    from rensa import RMinHash

    return {"library": "rensa", "algorithm_version": RMinHash.ALGORITHM_VERSION}


def find_near_duplicates(
    tokens: TokenFile, skipped: Mask, params: NearDuplicateParams, salts: Hashes | None = None
) -> NearDuplicates:
    """The near duplicates among the rows of a token file; the row numbers give the order.

    By position in `tokens`: `skipped` rows are not compared, bool [N]; rows of different `salts`, uint64 [N], are
    nothing to each other.
    """

    def shingled(start: int, rows: HashRows) -> HashRows:
        found = ngrams(rows, params.ngram)
        return found if salts is None else HashRows(found.hashes ^ salts[start + found.owners()], found.offsets)

    with _Signatures(tokens.folder, len(tokens), params) as signatures:
        with progress(list[str](), total=len(tokens), desc="near duplicates") as bar:
            for start, batch in tokens.batches():
                stop = start + len(batch.offsets) - 1
                shingles_of = shingled(start, batch.without(skipped[start:stop]))
                signatures.write(start, _minhash(shingles_of, params.permutations))
                bar.update(stop - start)
        candidates = np.flatnonzero(_shares_a_bucket(signatures, skipped))
        in_order = np.argsort(tokens.rows[candidates])
        buckets = _bucket_numbers(signatures, candidates)[in_order]
        sketches = signatures.sketches(candidates)[in_order]
        candidates = candidates[in_order]
    shingles = lru_cache(4096)(lambda position: np.unique(shingled(position, tokens.at(position)).hashes))
    pairs = list(_greedy(candidates, buckets, sketches, shingles, params))
    repeats, originals, similarity = zip(*pairs, strict=True) if pairs else ((), (), ())
    return NearDuplicates(
        tokens.rows[np.array(repeats, dtype=np.int64)],
        tokens.rows[np.array(originals, dtype=np.int64)],
        np.array(similarity, dtype=np.float64),
    )


def instruction_salt(instruction: str) -> int:
    """The salt of the texts under an instruction, below 2**64; 0 of none."""
    return int(query_id(instruction)[:16], 16) if instruction else 0


def band_rows(threshold: float, permutations: int) -> int:
    """Signature slots a band: the most that miss a pair at the threshold with probability `MISSED` or less."""
    for rows in range(permutations, 1, -1):
        if (1 - threshold**rows) ** (permutations // rows) <= MISSED:
            return rows
    return 1


class _Signatures:
    """Of N rows, in temporary files: the lowest byte of each signature slot, and a key of each band of slots."""

    def __init__(self, folder: Path, rows: int, params: NearDuplicateParams) -> None:
        self.width = band_rows(params.threshold, params.permutations)
        self.bands = params.permutations // self.width
        self.rows, self._slots, self._folder = rows, params.permutations, folder
        with disk_errors(folder), contextlib.ExitStack() as files:
            self._sketches = files.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            self._keys = files.enter_context(tempfile.TemporaryFile(dir=folder, buffering=0))
            self._files = files.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def write(self, start: int, signatures: np.ndarray[Any, Any]) -> None:
        """Add those of the rows from `start` on, uint32 [B, permutations]; raises WorkError if the disk is full."""
        cut = signatures[:, : self.bands * self.width].reshape(len(signatures), self.bands, self.width)
        keys = np.ascontiguousarray(_band_keys(cut).T)
        with disk_errors(self._folder):
            _write(self._sketches, start * self._slots, signatures.astype(np.uint8))
            for band in range(self.bands):
                _write(self._keys, (band * self.rows + start) * keys.itemsize, keys[band])

    def keys(self, band: int) -> Iterator[tuple[int, Hashes]]:
        """The keys of a band, uint64 [N] in pieces, each with the position of its first row."""
        for start in range(0, self.rows, _READ_ROWS):
            count = min(_READ_ROWS, self.rows - start)
            yield start, _read(self._keys, (band * self.rows + start) * 8, count * 8, np.uint64)

    def sketches(self, positions: Rows) -> np.ndarray[Any, Any]:
        """The bytes of some rows, uint8 [len(positions), permutations]; the positions ascend."""
        found = np.empty((len(positions), self._slots), np.uint8)
        for start in range(0, self.rows, _READ_ROWS):
            first, last = np.searchsorted(positions, [start, start + _READ_ROWS])
            if first < last:
                count = min(_READ_ROWS, self.rows - start)
                read = _read(self._sketches, start * self._slots, count * self._slots, np.uint8)
                found[first:last] = read.reshape(count, self._slots)[positions[first:last] - start]
        return found


def _write(file: IO[bytes], offset: int, array: np.ndarray[Any, Any]) -> None:
    file.seek(offset)
    content = array.data.cast("B")
    while content:
        content = content[file.write(content) :]


def _read(file: IO[bytes], offset: int, size: int, dtype: Any) -> np.ndarray[Any, Any]:
    file.seek(offset)
    return np.frombuffer(file.read(size), dtype)


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


def _shares_a_bucket(signatures: _Signatures, skipped: Mask) -> Mask:
    """Which of the rows that are not skipped have a band key in common with another: bool [N]."""
    shares = np.zeros(signatures.rows, bool)
    for band in range(signatures.bands):
        repeated = _repeated(signatures, band, skipped)
        for start, keys in signatures.keys(band) if len(repeated) else ():
            at = np.minimum(np.searchsorted(repeated, keys), len(repeated) - 1)
            shares[start : start + len(keys)] |= repeated[at] == keys
    return shares & ~skipped


def _repeated(signatures: _Signatures, band: int, skipped: Mask) -> Hashes:
    """The keys of a band that several rows have, sorted; keys are looked at by their first bits, a part at a time."""
    parts = max(1, -(-signatures.rows // _SORTED_KEYS))
    found = [np.zeros(0, np.uint64)]
    for part in range(parts):
        low, high = (np.uint64(min(2**64 - 1, edge * 2**64 // parts)) for edge in (part, part + 1))
        some = [np.zeros(0, np.uint64)]
        for start, keys in signatures.keys(band):
            inside = (keys >= low) & ((keys < high) | (part == parts - 1)) & ~skipped[start : start + len(keys)]
            some.append(keys[inside])
        ordered = np.sort(np.concatenate(some))
        found.append(np.unique(ordered[1:][ordered[1:] == ordered[:-1]]))
    return np.concatenate(found)


def _bucket_numbers(signatures: _Signatures, positions: Rows) -> Rows:
    """A number of each band key, distinct across bands, int64 [len(positions), bands]; -1 where no other row has it.

    The positions ascend.
    """
    numbers = np.empty((len(positions), signatures.bands), np.int64)
    first = 0
    for band in range(signatures.bands):
        own = [np.zeros(0, np.uint64)]
        for start, keys in signatures.keys(band):
            begin, end = np.searchsorted(positions, [start, start + len(keys)])
            own.append(keys[positions[begin:end] - start])
        distinct, inverse, counts = np.unique(np.concatenate(own), return_inverse=True, return_counts=True)
        numbers[:, band] = np.where(counts[inverse] > 1, first + inverse, -1)
        first += len(distinct)
    return numbers


def _greedy(
    candidates: Rows,
    buckets: Rows,
    sketches: np.ndarray[Any, Any],
    shingles: Callable[[int], Hashes],
    params: NearDuplicateParams,
) -> Iterable[tuple[int, int, float]]:
    """(position, position of its original, similarity) of every candidate that nearly repeats an earlier one.

    `candidates` [M], `buckets` [M, bands] and `sketches` [M, permutations] are in the order of the rows.
    """
    t = params.threshold
    floor = params.permutations * t - _DEVIATIONS * (params.permutations * t * (1 - t)) ** 0.5
    representatives: dict[int, list[int]] = {}  # by bucket, indices into `candidates`, so in order of the rows
    for index, (position, numbers) in enumerate(zip(candidates, buckets, strict=True)):
        numbers = numbers[numbers >= 0].tolist()
        earlier = np.array(_in_buckets(representatives, numbers), dtype=np.int64)
        agreeing = earlier[np.count_nonzero(sketches[earlier] == sketches[index], axis=1) >= floor]
        others = map(int, candidates[agreeing])
        compared = ((other, jaccard(shingles(other), shingles(int(position)))) for other in others)
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
