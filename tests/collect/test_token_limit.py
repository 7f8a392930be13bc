"""The limit holds exactly, however few texts are tokenised whole."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.collect import token_limit
from pipeline.collect.token_limit import TokenLimit
from tests.conftest import tiny_tokenizer

WORDS = ["a", "of", "naïve", "tokenisation", "", "\n\n- ", "2+2=5", "東京都", "🚀🚀", "x" * 70, "don't", "\tif"]


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was tokenised, in order."""
    seen: list[str] = []
    plain = token_limit.token_counts

    def counting(tokenizer: Any, texts: Sequence[str]) -> list[int]:
        seen.extend(texts)
        return plain(tokenizer, texts)

    monkeypatch.setattr(token_limit, "token_counts", counting)
    return seen


@pytest.mark.parametrize("limit", [1, 20, 60, 200])
@pytest.mark.parametrize("known", [3, 500_000])
def test_it_says_what_tokenising_each_text_says(monkeypatch: pytest.MonkeyPatch, limit: int, known: int) -> None:
    monkeypatch.setattr(token_limit, "_KNOWN_WORDS", known)
    draw, tokenizer = random.Random(limit), tiny_tokenizer()
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(60))) for _ in range(200)]
    expected = [len(tokenizer(text)["input_ids"]) > limit for text in texts]
    check = TokenLimit(limit, tokenizer)
    assert check(texts[:90]).tolist() + check(texts[90:]).tolist() == expected
    assert check([]).tolist() == []


def test_words_are_tokenised_once_and_texts_only_near_the_limit(tokenised: list[str]) -> None:
    """A token of the tiny tokenizer is a byte, the space before a word included."""
    check = TokenLimit(100, tiny_tokenizer())
    far, near = "é " * 11 + "é", "é " * 25 + "é"  # estimated as 12 and 26 times 3
    assert check([far, far]).tolist() == [False, False]
    assert tokenised == [" é"]
    assert check([near, near + " new"]).tolist() == [False, False]
    assert tokenised == [" é", " new", near, near + " new"]


def test_a_text_without_spaces_is_tokenised_whole(tokenised: list[str]) -> None:
    text = "東" * 65
    assert TokenLimit(10_000, tiny_tokenizer())([text]).tolist() == [False]
    assert tokenised == [text]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "all-MiniLM-L6-v2"])
def test_no_text_has_twice_the_tokens_of_its_words(name: str) -> None:
    """What the margin rests on, with tokenizers that split before spaces and that drop them."""
    from transformers import AutoTokenizer

    from bench.common import ROOT, demo_queries

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models" / name)
    draw = random.Random(0)
    odd = [" ".join(draw.choices(WORDS, k=40)) for _ in range(200)]
    for text in [*demo_queries(200), *odd]:
        estimate = sum(len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in text.split(" "))
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= 1.5 * estimate
