"""Normalising, filtering, sampling and splitting: by content, never by position."""

import random
import unicodedata
from collections import Counter
from collections.abc import Sequence

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts import QUERIES, check_table
from pipeline.queries import (
    FATES,
    count_fates,
    drop_lengths,
    drop_token_lengths,
    normalize_text,
    query_id,
    sample,
    split,
    split_table,
    to_frame,
)

ARABIC = "ما هي عاصمة فرنسا؟"
HEBREW_MARKED = "\u200fשלום\u200f, world"
FAMILY = "👨‍👩‍👧‍👦"

any_text = st.text(
    st.characters(exclude_categories=[]) | st.sampled_from(" \t\n\r\x00\x85\u2028\u3000\ud83d\ude00\u0301")
)


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("e\u0301", "é"),
        ("e\x00\u0301", "é"),
        ("a\x00b\x07\x1b[0m", "ab[0m"),
        ("\ud83d\ude00", "😀"),
        ("a\ud800b\udc00", "ab"),
        ("\ud800", ""),
        ("  a \u00a0\u3000 b\t", "a b"),
        ("a\r\nb\rc\u2028d\x85e", "a\nb\nc\nd\ne"),
        ("a  \n\n\n\n\n  b", "a\n\n  b"),
        ("def f():\n\treturn  1\n\u00a0\u00a0# x", "def f():\n\treturn 1\n  # x"),
        ("\x00 \ud800\n", ""),
        (ARABIC, ARABIC),
        (HEBREW_MARKED, HEBREW_MARKED),
        (FAMILY, FAMILY),
        ('"quoted" <b>&amp;</b> \\n', '"quoted" <b>&amp;</b> \\n'),
        ("ﬁ ½ Ａ", "ﬁ ½ Ａ"),
    ],
)
def test_normalize(raw: str, normal: str) -> None:
    assert normalize_text(raw) == normal


@given(any_text)
def test_normalizing_is_idempotent_and_gives_plain_utf8(text: str) -> None:
    once = normalize_text(text)
    assert normalize_text(once) == once
    assert once.encode("utf-8").decode("utf-8") == once
    assert once == once.strip()
    assert unicodedata.is_normalized("NFC", once)
    assert not {unicodedata.category(char) for char in once} & {"Cs"}
    assert {char for char in once if unicodedata.category(char) == "Cc"} <= {"\n", "\t"}


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_letters_numbers_punctuation_and_symbols_are_never_lost(text: str) -> None:
    assert normalize_text(text) == unicodedata.normalize("NFC", text)


def test_ids_are_content_hashes() -> None:
    assert query_id("") == "e3b0c44298fc1c149afbf4c8996fb924"
    frame = to_frame([("s", "cafe\u0301  noir "), ("t", "café noir")])
    assert frame["id"].to_list() == [query_id("café noir")] * 2


def texts(count: int, start: int = 0) -> list[tuple[str, str]]:
    return [("s", f"question number {index}") for index in range(start, start + count)]


def fates(frame: pl.DataFrame) -> list[str | None]:
    return frame["fate"].to_list()


def test_limits_count_characters_and_hold_at_their_edges() -> None:
    frame = to_frame([("s", text) for text in ("", " \x00", "a", "ab", "é" * 5, "é" * 6, "😀😀", "b" * 100_000)])
    result = drop_lengths(frame, min_chars=2, max_chars=5)
    assert fates(result) == ["empty", "empty", "too_short", None, None, "too_long", None, "too_long"]


def test_the_first_of_equal_texts_stays() -> None:
    frame = to_frame([("first", "the same"), ("second", " the  same\n"), ("second", "another"), ("third", "the same")])
    result = drop_lengths(frame, min_chars=1, max_chars=100)
    assert fates(result) == [None, "duplicate", None, "duplicate"]


def test_tokens_are_counted_for_the_rows_that_are_left_only() -> None:
    asked: list[str] = []

    def words(batch: Sequence[str]) -> list[int]:
        asked.extend(batch)
        return [len(text.split()) for text in batch]

    frame = to_frame([("s", text) for text in ("one two", "one two three", "one two", "x", "one two three four")])
    frame = drop_lengths(frame, min_chars=2, max_chars=100)
    result = drop_token_lengths(frame, max_tokens=3, count_tokens=words)
    assert fates(result) == [None, None, "duplicate", "too_short", "too_many_tokens"]
    assert asked == ["one two", "one two three", "one two three four"]


def clean(rows: list[tuple[str, str]]) -> pl.DataFrame:
    return drop_lengths(to_frame(rows), min_chars=1, max_chars=100)


def ids_of(frame: pl.DataFrame, fate: str) -> set[str]:
    return set(frame.filter(pl.col("fate") == fate)["id"])


def test_no_query_changes_its_split_when_the_corpus_grows_or_is_shuffled() -> None:
    few, many = texts(500), texts(2000)
    random.Random(0).shuffle(many)
    small = split(clean(few), heldout_fraction=0.2, seed=0)
    large = split(clean(many), heldout_fraction=0.2, seed=0)
    known = set(small["id"])
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
    new = {query_id(text) for _, text in texts(30, start=300)}
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


def test_counts_add_up_per_source() -> None:
    rows = [("a", "x"), ("a", ""), ("b", "same text"), ("a", "same text"), *texts(100)]
    frame = drop_lengths(to_frame(rows), min_chars=2, max_chars=100)
    frame = split(sample(frame, rows=60, seed=0), heldout_fraction=0.3, seed=0)
    counts = count_fates(frame)
    assert set(counts) == {"all", "a", "b", "s"}
    for name, count in counts.items():
        assert set(count) == {"read", *FATES}
        assert count["read"] == sum(count[fate] for fate in FATES), name
    assert counts["a"] == dict.fromkeys(FATES, 0) | {"read": 3, "too_short": 1, "empty": 1, "duplicate": 1}
    assert counts["all"]["sampled_out"] == 41
    assert counts["all"]["train"] + counts["all"]["heldout"] == 60


def test_the_tables_of_both_splits_keep_the_contract() -> None:
    frame = split(clean(texts(200)), heldout_fraction=0.3, seed=0)
    tables = {name: split_table(frame, name) for name in ("train", "heldout")}
    for name, table in tables.items():
        check_table(table, QUERIES, name)
    found = Counter(row["id"] for table in tables.values() for row in table.to_pylist())
    assert found == Counter(query_id(text) for _, text in texts(200))


def test_no_rows_at_all_are_empty_tables() -> None:
    frame = split(sample(clean([]), rows=3, seed=0), heldout_fraction=0.5, seed=0)
    assert split_table(frame, "train").schema == QUERIES
    assert count_fates(frame) == {"all": {"read": 0} | dict.fromkeys(FATES, 0)}
