"""Filtering, sampling and splitting: by content, never by position."""

import hashlib
import random

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.collect.params import CollectParams
from pipeline.collect.rows import (
    FATES,
    allot,
    as_text,
    count_fates,
    drop_duplicates,
    drop_lengths,
    sample,
    set_fate,
    split,
    to_frame,
    undecided,
)
from pipeline.core.config import Params, validate
from pipeline.core.errors import ParamsError
from pipeline.core.text import query_id


def test_ids_are_content_hashes() -> None:
    assert query_id("") == "e3b0c44298fc1c149afbf4c8996fb924"
    frame = to_frame(3, ["cafe\u0301  noir ", "café noir"])
    assert list(map(as_text, frame["id"])) == [query_id("café noir")] * 2
    assert frame["source"].to_list() == [3, 3]


def texts(count: int, start: int = 0) -> list[str]:
    return [f"question number {index}" for index in range(start, start + count)]


def fates(frame: pl.DataFrame) -> list[str | None]:
    return frame["fate"].to_list()


def test_limits_count_characters_and_hold_at_their_edges() -> None:
    frame = to_frame(0, ["", " \x00", "a", "ab", "é" * 5, "é" * 6, "😀😀", "b" * 100_000])
    result = drop_lengths(frame, min_chars=2, max_chars=5)
    assert fates(result) == ["empty", "empty", "too_short", None, None, "too_long", None, "too_long"]
    assert undecided(result).tolist() == [False, False, False, True, True, False, True, False]


def test_the_first_of_equal_texts_stays() -> None:
    frame = pl.concat([to_frame(0, ["the same"]), to_frame(1, [" the  same\n", "another"]), to_frame(2, ["the same"])])
    assert fates(drop_duplicates(frame)) == [None, "duplicate", None, "duplicate"]


def test_a_fate_is_for_good() -> None:
    frame = set_fate(to_frame(0, texts(4)), [0, 2], "too_long")
    assert fates(set_fate(frame, np.array([2, 3]), "duplicate")) == ["too_long", None, "too_long", "duplicate"]
    assert fates(set_fate(frame, [], "duplicate")) == fates(frame)


def clean(rows: list[str], source: int = 0) -> pl.DataFrame:
    return drop_duplicates(to_frame(source, rows))


def ids_of(frame: pl.DataFrame, fate: str) -> set[str]:
    return set(map(as_text, frame.filter(pl.col("fate") == fate)["id"]))


def test_no_query_changes_its_split_when_the_corpus_grows_or_is_shuffled() -> None:
    few, many = texts(500), texts(2000)
    random.Random(0).shuffle(many)
    small = split(clean(few), heldout_fraction=0.2, seed=0)
    large = split(clean(many), heldout_fraction=0.2, seed=0)
    known = set(map(as_text, small["id"]))
    for name in ("train", "heldout"):
        assert ids_of(small, name) == ids_of(large, name) & known
    assert ids_of(small, "train") | ids_of(small, "heldout") == known


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_the_split_has_its_fraction(fraction: float) -> None:
    result = split(clean(texts(10_000)), heldout_fraction=fraction, seed=3)
    share = len(ids_of(result, "heldout")) / 10_000
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 10_000) ** 0.5


def test_a_larger_fraction_only_adds_to_the_heldout_split() -> None:
    small, large = (ids_of(split(clean(texts(1000)), heldout_fraction=f, seed=0), "heldout") for f in (0.1, 0.2))
    assert small < large


def test_a_sample_of_a_larger_size_contains_the_smaller_one() -> None:
    small, large = (
        set(sample(clean(texts(300)), rows=n, seed=0).filter(pl.col("fate").is_null())["id"]) for n in (20, 50)
    )
    assert (len(small), len(large)) == (20, 50)
    assert small < large


def test_a_grown_corpus_keeps_the_part_of_its_sample_that_still_ranks() -> None:
    before = sample(clean(texts(300)), rows=50, seed=0).filter(pl.col("fate").is_null())
    after = sample(clean(texts(330)), rows=50, seed=0).filter(pl.col("fate").is_null())
    new = {int(query_id(text), 16) for text in texts(30, start=300)}
    assert len(after) == 50
    assert set(after["id"]) <= set(before["id"]) | new
    assert len(set(before["id"]) - set(after["id"])) == len(set(after["id"]) & new)


def test_the_seed_changes_sample_and_split_and_the_two_are_independent() -> None:
    samples = [set(sample(clean(texts(400)), rows=100, seed=s).filter(pl.col("fate").is_null())["id"]) for s in (0, 1)]
    splits = [ids_of(split(clean(texts(400)), heldout_fraction=0.5, seed=s), "heldout") for s in (0, 1)]
    assert 5 < len(samples[0] & samples[1]) < 60
    assert 50 < len(splits[0] & splits[1]) < 150
    sampled = split(sample(clean(texts(4000)), rows=1000, seed=0), heldout_fraction=0.5, seed=0)
    assert abs(len(ids_of(sampled, "heldout")) - 500) < 70


def test_a_sample_larger_than_the_corpus_takes_all() -> None:
    assert fates(sample(clean(texts(3)), rows=10, seed=0)) == [None] * 3


def test_sample_and_split_are_what_they_were_from_the_beginning() -> None:
    frame = split(sample(clean(texts(300)), rows=40, seed=7), heldout_fraction=0.2, seed=7)
    digests = {}
    for name in ("train", "heldout"):
        ids = sorted(ids_of(frame, name))
        digests[name] = (len(ids), hashlib.sha256("".join(ids).encode()).hexdigest()[:16])
    assert digests == {"train": (32, "7869dfd2a6b795f9"), "heldout": (8, "0e9a52cec107b761")}


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "weights", "available", "shares"),
    [
        (100, [1, 1], [500, 500], [50, 50]),
        (100, [3, 1], [500, 500], [75, 25]),
        (100, [3, 1], [60, 500], [60, 40]),  # the first gives 15 to the second
        (100, [0.6, 0.3, 0.1], [10, 20, 500], [10, 20, 70]),
        (100, [2, 1, 1], [10, 500, 500], [10, 45, 45]),
        (100, [2, 1, 1], [0, 500, 500], [0, 50, 50]),
        (100, [1, 1, 1], [500, 500, 500], [34, 33, 33]),  # of equal fractions the first
        (10, [0.55, 0.45], [100, 100], [6, 4]),
        (10, [0.1, 0.1, 0.1], [3, 3, 3], [3, 3, 3]),  # fewer than asked for
        (7, [1e-9, 1], [100, 100], [0, 7]),
        (5, [1], [0], [0]),
    ],
)
def test_rows_are_allotted_by_weight(rows: int, weights: list[float], available: list[int], shares: list[int]) -> None:
    assert allot(rows, weights, available) == shares


@given(st.lists(st.tuples(st.floats(0.001, 1000), st.integers(0, 50)), min_size=1, max_size=6), st.integers(1, 200))
def test_no_row_of_a_weighted_sample_is_lost(sources: list[tuple[float, int]], rows: int) -> None:
    weights, available = [weight for weight, _ in sources], [count for _, count in sources]
    shares = allot(rows, weights, available)
    assert sum(shares) == min(rows, sum(available))
    assert all(0 <= share <= count for share, count in zip(shares, available, strict=True))


def test_a_weighted_sample_takes_the_smallest_hashes_of_each_source() -> None:
    frame = pl.concat([to_frame(0, texts(200)), to_frame(1, texts(200, start=200))])
    weighted = sample(frame, rows=40, seed=0, weights=[3, 1])
    for source, share in ((0, 30), (1, 10)):
        alone = sample(clean(texts(200, start=200 * source), source), rows=share, seed=0)
        kept = weighted.filter((pl.col("source") == source) & pl.col("fate").is_null())
        assert set(kept["id"]) == set(alone.filter(pl.col("fate").is_null())["id"])


@pytest.mark.parametrize(
    ("weights", "size", "problem"),
    [
        ([1.0, None], 10, "collect.sources: .*either all sources have a weight or none: missing for b.txt"),
        ([1.0, 2.0], None, "collect.sample: .*the weights of collect.sources share out a sample: set its size"),
        ([0.0, 1.0], 10, r"collect.sources.0.local.weight: .*greater than 0"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: list[float | None], size: int | None, problem: str) -> None:
    sources = [
        {"kind": "local", "path": path} | ({} if weight is None else {"weight": weight})
        for path, weight in zip(("a.txt", "b.txt"), weights, strict=True)
    ]
    content = {"collect": {"local_dir": "x", "sources": sources, "sample": size}}
    with pytest.raises(ParamsError, match=problem):
        validate(content, Section, where="params.yaml")


class Section(Params):
    collect: CollectParams


# --- counts ---------------------------------------------------------------------------------------------------------


def test_counts_add_up_per_source() -> None:
    frame = pl.concat([to_frame(0, ["x", "", "same text"]), to_frame(1, ["same text"]), to_frame(2, texts(100))])
    frame = drop_duplicates(drop_lengths(frame, min_chars=2, max_chars=100))
    frame = split(sample(frame, rows=60, seed=0), heldout_fraction=0.3, seed=0)
    counts = count_fates(frame, ["a", "b", "s"])
    assert set(counts) == {"all", "a", "b", "s"}
    for name, count in counts.items():
        assert set(count) == {"read", *FATES}
        assert count["read"] == sum(count[fate] for fate in FATES), name
    zeros = dict.fromkeys(FATES, 0)
    assert counts["b"] == zeros | {"read": 1, "duplicate": 1}
    assert (counts["a"]["too_short"], counts["a"]["empty"]) == (1, 1)
    assert counts["all"]["sampled_out"] == 41
    assert counts["all"]["train"] + counts["all"]["heldout"] == 60


def test_no_rows_at_all_have_no_fates() -> None:
    frame = split(sample(clean([]), rows=3, seed=0), heldout_fraction=0.5, seed=0)
    assert count_fates(frame, []) == {"all": {"read": 0} | dict.fromkeys(FATES, 0)}
