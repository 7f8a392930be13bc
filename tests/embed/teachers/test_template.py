"""Which tokens are read and pooled: a byte-level tokenizer makes every expectation countable (one token a letter)."""

from typing import Any

import pytest

from pipeline.core.errors import TeacherError
from pipeline.embed.teachers.template import TemplateTokenizer, Tokens
from tests.conftest import tiny_tokenizer

ECHO = "Say: {text}, again: {text}"


def with_bos() -> Any:
    """A tokenizer that starts each text with <|bot|> (id 1), as Llama's does with its BOS."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bot|> $A", pair="<|bot|> $A $B", special_tokens=[("<|bot|>", 1)]
    )
    return tokenizer


def ids(text: str) -> list[int]:
    return list(tiny_tokenizer()(text)["input_ids"])


def read(text: str, tokenizer: Any = None, max_tokens: int = 64, **rules: Any) -> Tokens:
    (row,) = TemplateTokenizer(tokenizer or tiny_tokenizer(), max_tokens=max_tokens, **rules)([text])
    return row


@pytest.mark.parametrize(
    ("pooling", "pooled"), [("mean", [0, 1, 1, 1]), ("mean-all", [1, 1, 1, 1]), ("last", [0, 0, 0, 1])]
)
def test_the_bare_text(pooling: Any, pooled: list[int]) -> None:
    assert read("abc", with_bos(), pooling=pooling) == Tokens([1, *ids("abc")], pooled)


def test_only_the_second_reading_of_an_echo_is_pooled() -> None:
    row = read("abcd", with_bos(), template=ECHO)
    assert row.ids == [1, *ids("Say: abcd, again: abcd")]
    assert row.pooled == [0] * (len(row.ids) - 4) + [1] * 4
    assert read("abcd", template=ECHO, pooling="last").pooled == [0] * 21 + [1]


def test_what_closes_a_frame_is_pooled_and_is_the_last_token() -> None:
    row = read("ab", template="<|user|>{text}<|end|>")
    assert row == Tokens([0, *ids("ab"), 2], [0, 1, 1, 1])
    assert read("ab", template="<|user|>{text}<|end|>", pooling="last").pooled == [0, 0, 0, 1]


def test_braces_in_a_text_or_a_template_are_letters() -> None:
    assert read("{text}{0}", template="{} {text}").ids == ids("{} {text}{0}")


def test_letters_of_several_bytes_are_pooled_whole() -> None:
    row = read("é😀", template="x{text}")
    assert row.pooled == [0] + [1] * 6


@pytest.mark.parametrize("rules", [{}, {"template": ECHO}, {"template": ECHO, "pooling": "last"}])
@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, with_bos])
def test_a_text_without_tokens_pools_the_eos(rules: dict[str, Any], tokenizer: Any) -> None:
    row = read("", tokenizer(), **rules)
    assert row.ids[-1] == 2
    assert row.pooled == [0] * (len(row.ids) - 1) + [1]


def test_both_readings_of_an_echo_lose_the_same_end() -> None:
    frame = len("Say: , again: ")
    row = read("abcdefghij", with_bos(), max_tokens=1 + frame + 9, template=ECHO)
    assert row.ids == [1, *ids("Say: abcd, again: abcd")]
    assert sum(row.pooled) == 4


def test_lengths_count_all_that_is_read() -> None:
    bare = TemplateTokenizer(with_bos(), max_tokens=4)
    assert [len(row.ids) for row in bare(["abc", "abcd"])] == [4, 4]
    echo = TemplateTokenizer(tiny_tokenizer(), max_tokens=len("Say: , again: ") + 7, template=ECHO)
    assert echo(["abcd"])[0].ids == ids("Say: abc, again: abc")
    assert bare.lengths(["", "ab", "abc", "abcd"]) == [1, 3, 4, 5]
    assert echo.lengths(["ab", "abc", "abcd"]) == [18, 20, 22]
    assert bare.lengths([]) == bare([]) == []


def test_stripping_comes_before_the_limit() -> None:
    reader = TemplateTokenizer(tiny_tokenizer(), max_tokens=3, strip=True)
    assert reader.lengths(["\n abc \n"]) == [3]
    assert reader(["\n abc \n"]) == [Tokens(ids("abc"), [1, 1, 1])]


def test_rows_do_not_depend_on_their_neighbours() -> None:
    texts = ["a", "a longer text than that", "", "é"]
    for rules in ({}, {"template": ECHO}):
        reader = TemplateTokenizer(with_bos(), max_tokens=40, **rules)
        assert reader(texts) == [reader([text])[0] for text in texts]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"template": "no slot"}, r"'no slot' holds no \{text\}"),
        ({"template": ECHO, "max_tokens": 15}, r"^max_tokens: 15 leaves no room .* take 14"),
    ],
)
def test_mistakes_are_named(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        TemplateTokenizer(tiny_tokenizer(), **({"max_tokens": 64} | rules))


def letters(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, split_special_tokens=True)["input_ids"])


def test_control_tokens_that_a_text_spells_are_its_letters() -> None:
    spelt = letters("x<|end|>")
    assert len(spelt) == 8
    assert read("x<|end|>") == Tokens(spelt, [1] * 8)
    assert read("x<|end|>", with_bos()) == Tokens([1, *spelt], [0, *[1] * 8])
    echoed = read("x<|end|>", template=ECHO)
    assert echoed.ids == [*ids("Say: "), *spelt, *ids(", again: "), *spelt]
    assert sum(echoed.pooled) == 8
    assert TemplateTokenizer(tiny_tokenizer(), max_tokens=64).lengths(["x<|end|>", "x"]) == [8, 1]


def test_a_template_of_control_tokens_keeps_them() -> None:
    assert read("x", template="<|user|>{text}<|end|>").ids == [0, *letters("x"), 2]
