"""Thinking is stripped, loops are found, nothing else is touched."""

import pytest

from pipeline.generate.response_text import COPIES, LONGEST_PIECE, LOOP_CHARS, ends_in_loop, strip_thinking


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
