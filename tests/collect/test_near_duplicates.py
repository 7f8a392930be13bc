"""Near duplicates, against the definition: the first stays, exact Jaccard decides."""

import random
from pathlib import Path

import numpy as np
import pytest

from pipeline.collect import near_duplicates
from pipeline.collect.near_duplicates import NearDuplicateParams, band_rows, find_near_duplicates, jaccard
from pipeline.collect.ngrams import TokenHasher, ngrams
from tests.collect.helpers import token_file

PARAMS = NearDuplicateParams()


def duplicates(
    folder: Path, texts: list[str], params: NearDuplicateParams = PARAMS, skipped: list[int] | None = None
) -> dict[int, tuple[int, float]]:
    """(original, similarity) by row."""
    file = token_file(folder, texts)
    out = np.zeros(len(texts), bool)
    out[skipped or []] = True
    found = find_near_duplicates(file, out, params)
    file.close()
    pairs = zip(found.originals.tolist(), found.similarity.tolist(), strict=True)
    return dict(zip(found.rows.tolist(), pairs, strict=True))


def passage(length: int, seed: int = 0) -> list[str]:
    return [f"word{random.Random(seed).randrange(10**9)}x{index}" for index in range(length)]


def changed(words: list[str], *places: int) -> str:
    return " ".join(f"new{place}" if place in places else word for place, word in enumerate(words))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is 2+2?", "What is 2+3?"),
        ("What is 2+2?", "What is 2-2?"),
        ("Write a poem about cats", "Write a poem about dogs"),
        ("yes", "no"),
        ("Translate to French: I am hungry", "Translate to German: I am hungry"),
        ("x = 1", "x == 1"),
    ],
)
def test_short_texts_that_differ_stay(tmp_path: Path, first: str, second: str) -> None:
    assert duplicates(tmp_path, [first, second]) == {}


@pytest.mark.parametrize(
    ("first", "second"),
    [("What is 2+2?", "what is  2 + 2 ?"), ("yes", "YES"), ("Hello, how are you?", "hello, how are you?")],
)
def test_the_same_tokens_are_a_near_duplicate_at_any_length(tmp_path: Path, first: str, second: str) -> None:
    assert duplicates(tmp_path, [first, second]) == {1: (0, 1.0)}


def test_one_word_of_a_hundred_changes_five_ngrams(tmp_path: Path) -> None:
    words = passage(104)  # 100 n-grams of 5
    texts = [" ".join(words), changed(words, 50)]
    assert duplicates(tmp_path, texts) == {1: (0, 95 / 105)}
    assert duplicates(tmp_path, texts, NearDuplicateParams(threshold=0.91)) == {}
    assert duplicates(tmp_path, [texts[0], changed(words, 30, 70)]) == {}  # 90 / 110
    assert duplicates(tmp_path, [texts[0], changed(words, 0)]) == {1: (0, 99 / 101)}


def test_a_row_is_held_against_rows_that_stayed(tmp_path: Path) -> None:
    words = passage(104)
    # The third is near the second, which went; from the first it is too far.
    texts = [" ".join(words), changed(words, 30), changed(words, 30, 70)]
    assert duplicates(tmp_path, texts) == {1: (0, 95 / 105)}
    assert duplicates(tmp_path, texts, skipped=[0]) == {2: (1, 95 / 105)}
    assert duplicates(tmp_path, [*texts, texts[0] + "."])[3] == (0, 100 / 101)


def test_order_is_that_of_row_numbers_and_not_of_the_file(tmp_path: Path) -> None:
    words = passage(60)
    file = token_file(tmp_path, [changed(words, 59), " ".join(passage(9, seed=1)), " ".join(words)], rows=[7, 3, 5])
    found = find_near_duplicates(file, np.zeros(3, bool), PARAMS)
    file.close()
    assert (found.rows.tolist(), found.originals.tolist()) == ([7], [5])


def corpus(count: int) -> list[str]:
    """Passages of 60 words; every third row repeats an earlier one with up to three changed words."""
    rng, texts = random.Random(1), [passage(60, seed=seed) for seed in range(count)]
    for index in range(30, count, 3):
        source = texts[rng.randrange(index)]
        texts[index] = changed(source, *rng.sample(range(60), rng.randrange(4))).split()
    return [" ".join(words) for words in texts]


def by_definition(texts: list[str], threshold: float) -> dict[int, tuple[int, float]]:
    hasher = TokenHasher()
    sets = [np.unique(ngrams(hasher([text]), 5).hashes) for text in texts]
    kept: list[int] = []
    found: dict[int, tuple[int, float]] = {}
    for row, own in enumerate(sets):
        near = next(((k, s) for k in kept if (s := jaccard(sets[k], own)) >= threshold), None)
        if near:
            found[row] = near
        else:
            kept.append(row)
    return found


@pytest.mark.parametrize("threshold", [0.6, 0.9])
def test_it_finds_what_comparing_all_pairs_finds(tmp_path: Path, threshold: float) -> None:
    texts = corpus(300)
    expected = by_definition(texts, threshold)
    assert len(expected) > 20
    assert duplicates(tmp_path, texts, NearDuplicateParams(threshold=threshold)) == expected


def test_a_grown_corpus_loses_nothing_that_it_kept(tmp_path: Path) -> None:
    texts = corpus(300)
    few, many = duplicates(tmp_path, texts[:200]), duplicates(tmp_path, texts)
    assert few == {row: pair for row, pair in many.items() if row < 200}
    assert len(many) > len(few)


def test_a_row_of_a_template_with_thousands_of_variants_meets_few_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So time is linear in rows: each meets at most so many of each of its buckets."""
    met: list[int] = []
    plain = near_duplicates._in_buckets
    monkeypatch.setattr(near_duplicates, "_in_buckets", lambda *found: counted(plain(*found)))

    def counted(places: list[int]) -> list[int]:
        met.append(len(places))
        return places

    words, bands = passage(60), PARAMS.permutations // band_rows(PARAMS.threshold, PARAMS.permutations)
    texts = [changed(words, 10, 30).replace("new", f"v{index}x") for index in range(4000)]  # 46 / 66 alike
    assert duplicates(tmp_path, texts) == {}
    assert near_duplicates.REPRESENTATIVES < max(met) <= bands * near_duplicates.REPRESENTATIVES < len(texts)


def test_no_rows(tmp_path: Path) -> None:
    assert duplicates(tmp_path, []) == {}
    assert duplicates(tmp_path, ["a", "a"], skipped=[0, 1]) == {}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_miss_few_pairs_at_the_threshold(threshold: float) -> None:
    rows = band_rows(threshold, 128)
    assert (1 - threshold**rows) ** (128 // rows) <= 1e-3
    if rows < 128:
        assert (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) > 1e-3


def test_signatures_are_the_same_on_every_machine() -> None:
    shingles = ngrams(TokenHasher()(["the quick brown fox jumps over the lazy dog"]), 5)
    signature = near_duplicates._minhash(shingles, 128)
    assert signature.shape == (1, 128)
    assert signature[0, :3].tolist() == [3496942257, 3801667693, 3705563227]
    assert near_duplicates.library() == {"library": "rensa", "algorithm_version": 2}
