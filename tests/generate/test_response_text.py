"""Thinking is stripped, loops are found, nothing else is touched."""

import pytest

from pipeline.generate.response_text import (
    COPIES,
    LONGEST_PIECE,
    LOOP_CHARS,
    ends_in_loop,
    looks_like_thinking,
    opens_thinking,
    strip_thinking,
    thinking,
)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>\nhm, two\n</think>\n\nFour.", "Four."),
        (" \n<think></think>Four.", "Four."),
        ("<think>never comes to an end", ""),
        ("  Four.\n", "  Four.\n"),
        (
            "Use the `<think>` tag to open and `</think>` to close.",
            "Use the `<think>` tag to open and `</think>` to close.",
        ),
        ("split at </think> and keep the rest", "split at </think> and keep the rest"),
        ("", ""),
    ],
)
def test_strip_thinking(text: str, left: str) -> None:
    assert strip_thinking(text) == left


@pytest.mark.parametrize(
    ("text", "left"),
    [("hm, two\n</think>\n\nFour.", "Four."), ("Four.", "Four."), ("<think>hm</think> Four.", "Four.")],
)
def test_strip_thinking_that_the_prompt_opened(text: str, left: str) -> None:
    assert strip_thinking(text, opened=True) == left


def test_thinking_that_the_prompt_opened_and_the_limit_cut_is_no_answer() -> None:
    assert strip_thinking("Okay, the user asks", opened=True, cut=True) == ""
    assert strip_thinking("hm</think> Four and", opened=True, cut=True) == "Four and"
    assert strip_thinking("Four and", cut=True) == "Four and"


# By family: Magistral, Seed, Kimi, OpenThinker, Command A, and gpt-oss with and without its control tokens.
OTHER_FAMILIES = [
    "[THINK]hm, two[/THINK]Four.",
    "<seed:think>hm, two</seed:think>Four.",
    "\u25c1think\u25b7hm\u25c1/think\u25b7\n\nFour.",
    "<|begin_of_thought|>hm<|end_of_thought|>\nFour.",
    "<|START_THINKING|>hm<|END_THINKING|>Four.",
    "<reasoning>hm</reasoning>Four.",
    "<|channel|>analysis<|message|>We add.<|end|><|start|>assistant<|channel|>final<|message|>Four.",
    "analysisWe add.assistantfinalFour.",
]


@pytest.mark.parametrize("text", OTHER_FAMILIES)
def test_thinking_of_other_families(text: str) -> None:
    assert strip_thinking(text) == "Four."
    assert looks_like_thinking(text)
    unfinished = text[: text.index("hm" if "hm" in text else "We add") + 4]
    assert strip_thinking(unfinished, cut=True) == ""


@pytest.mark.parametrize(
    "text", ["analysis of the question", "analysis", "Analysis: four.", "An [THINK] tag.", "use `</think>` to close it"]
)
def test_words_that_only_resemble_thinking(text: str) -> None:
    assert strip_thinking(text, cut=True) == text
    assert not looks_like_thinking(text)


@pytest.mark.parametrize("text", ["hm, two\n</think>\n\nFour.", "hm, two </think>\nFour.", "analysisWe add and stop"])
def test_thinking_that_was_left(text: str) -> None:
    assert strip_thinking(text) == text
    assert looks_like_thinking(text)


def test_a_prompt_may_open_the_block() -> None:
    assert opens_thinking("<|user|>q<|bot|><think>\n")
    assert opens_thinking("q[THINK]")
    assert not opens_thinking("<think></think>q")
    assert strip_thinking("hm[/THINK]Four.", opened=True) == "Four."


def test_thinking_that_came_apart_is_stripped_again() -> None:
    assert strip_thinking(thinking("hm", "Four.")) == "Four."
    assert strip_thinking(thinking("hm", None)) == ""


@pytest.mark.parametrize(
    "text",
    [
        "The answer is " + "no, " * 40,
        "Well. " + "I am a helpful assistant. " * 8 + "I am a he",
        "ha" * LOOP_CHARS + "\n\n",
        "1. " + "x" * LOOP_CHARS,
        "こんにちは。" * 40,
        "x" * 5000 + "".join(chr(65 + index % 26) for index in range(LONGEST_PIECE)) * COPIES,
        ("the cat sat on the mat and the dog sat on the mat " * 12)[:-3],
    ],
)
def test_loops(text: str) -> None:
    assert ends_in_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no, no, no, no, no",
        "no, " * 40 + "but yes in the end, as everybody will see soon.",
        "".join(f"{index}. I am a helpful assistant. " for index in range(20)),
        ("one piece of the text that comes again " * (COPIES - 1)),
        "x" * (LOOP_CHARS - 1),
        "Paris is the capital of France. It lies on the Seine, and it has about two million inhabitants.",
    ],
)
def test_no_loops(text: str) -> None:
    assert not ends_in_loop(text)


def test_exactly_enough_copies() -> None:
    piece = "abcdefghijklmnopqrstuvwxyz01234567890"
    assert ends_in_loop(piece * COPIES)
    assert not ends_in_loop((piece * COPIES)[1:])
