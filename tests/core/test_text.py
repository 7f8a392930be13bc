"""Texts that anyone may have written: safe to show, and in one form."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.text import by_length, normalize_text, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, naïve, 漢字\n\tindented", "plain, naïve, 漢字\n\tindented"),
        ("\x1b[2Jcleared\x07\r", "[2Jcleared"),
        ("\x9b31mred", "31mred"),
        ("right\u202eleft\u200b\ufeff", "rightleft"),
        ("", ""),
    ],
)
def test_what_commands_a_terminal_is_left_out(text: str, shown: str) -> None:
    assert visible(text) == shown


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


def test_groups_are_by_falling_length_and_within_both_limits() -> None:
    texts = ["aa", "a" * 9, "", "aaa", "aaa", "a"]
    assert by_length(texts, 9, 6) == [[1], [3, 4], [0, 5, 2]]
    assert by_length(texts, 2, 100) == [[1, 3], [4, 0], [5, 2]]
    assert by_length([], 2, 6) == []
