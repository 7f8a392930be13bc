"""Tokens, their hashes, n-grams, and the file of them."""

import hashlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.collect.ngrams import HashRows, TokenFile, TokenHasher, ngrams, tokens, words_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is 2+2?", ["what", "is", "2", "+", "2", "?"]),
        ("Don't STOP", ["don", "'", "t", "stop"]),
        ("  a\n\tb ", ["a", "b"]),
        ("Straße ΣΑΣ", ["strasse", "σασ"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("东京 3-go", ["东", "京", "3", "-", "go"]),
        ("سؤال؟", ["سؤال", "؟"]),
        ("👩‍🚀", ["👩", "\u200d", "🚀"]),
        ("", []),
    ],
)
def test_tokens(text: str, expected: list[str]) -> None:
    assert tokens([text])[0].to_list() == expected


def test_words_are_tokens_without_symbols() -> None:
    assert words_of("Don't add 2+2, 东京!") == ["don", "t", "add", "2", "2", "东", "京"]
    assert words_of("?!") == []


def rows_of(words: HashRows) -> list[list[int]]:
    return [words.hashes[start:end].tolist() for start, end in itertools.pairwise(words.offsets)]


def test_a_hash_depends_on_the_token_alone() -> None:
    first = TokenHasher()(["one two", "", "Two, one"])
    assert first.offsets.tolist() == [0, 2, 2, 5]
    one, two, again, comma, last = first.hashes.tolist()
    assert (one, two) == (last, again)
    assert len({one, two, comma}) == 3
    assert (one & 1, comma & 1) == (1, 0)  # the lowest bit tells words from symbols
    assert TokenHasher()(["two"]).hashes.tolist() == [two]
    assert one == int.from_bytes(hashlib.blake2b(b"one", digest_size=8).digest(), "little") | 1


def test_without_symbols_rows_keep_their_place() -> None:
    words = TokenHasher()(["a, b", "?!", "", "c."]).words()
    assert rows_of(words) == rows_of(TokenHasher()(["a b", "", "", "c"]))


small = st.lists(st.lists(st.integers(1, 5), max_size=8), max_size=8)


def numbered(rows: list[list[int]]) -> HashRows:
    lengths = [len(row) for row in rows]
    flat = np.array(list(itertools.chain.from_iterable(rows)), dtype=np.uint64)
    return HashRows(flat, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


@given(small, st.integers(1, 6))
def test_ngrams_are_equal_where_their_tokens_are(rows: list[list[int]], n: int) -> None:
    plain = [
        [tuple(row[i : i + n]) for i in range(len(row) - n + 1)] if len(row) >= n else [tuple(row)] if row else []
        for row in rows
    ]
    hashed = rows_of(ngrams(numbered(rows), n))
    assert [len(row) for row in hashed] == [len(row) for row in plain]
    pairs = set(zip(itertools.chain(*plain), itertools.chain(*hashed), strict=True))
    assert len(pairs) == len({gram for gram, _ in pairs}) == len({value for _, value in pairs})


def test_owners_name_the_row_of_each_ngram() -> None:
    assert ngrams(numbered([[1, 2, 3], [], [4], [5, 5]]), 2).owners().tolist() == [0, 0, 2, 3]


def test_dropped_rows_are_empty_in_their_place() -> None:
    words = numbered([[1, 2], [3], [], [4, 5]])
    assert rows_of(words.without(np.array([True, False, False, True]))) == [[], [3], [], []]


@given(small)
def test_a_file_gives_back_what_it_got(rows: list[list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = TokenFile(Path(folder) / "words")
        for start in range(0, len(rows), 3):
            part = rows[start : start + 3]
            file.append(np.arange(start, start + len(part)) * 10, numbered(part))
        file.finish()
        assert len(file) == len(rows)
        assert file.rows.tolist() == [10 * index for index in range(len(rows))]
        assert [rows_of(file.at(position))[0] for position in range(len(rows))] == rows
        assert [row for _, batch in file.batches() for row in rows_of(batch)] == rows
        file.close()


@pytest.mark.parametrize(("tokens", "most_rows", "starts"), [(4, 10, [0, 3]), (4, 2, [0, 2, 3, 5]), (99, 4, [0, 4])])
def test_batches_are_cut_by_tokens_and_by_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, most_rows: int, starts: list[int]
) -> None:
    monkeypatch.setattr("pipeline.collect.ngrams.BATCH_TOKENS", tokens)
    monkeypatch.setattr("pipeline.collect.ngrams.BATCH_ROWS", most_rows)
    file = TokenFile(tmp_path / "words")
    rows = [[1], [2, 2], [3] * 9, [], [4], []]
    file.append(np.arange(6), numbered(rows))
    file.finish()
    batches = list(file.batches())
    assert [start for start, _ in batches] == starts
    assert [row for _, batch in batches for row in rows_of(batch)] == rows
    file.close()
