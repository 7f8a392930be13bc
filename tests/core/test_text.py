"""Texts that anyone may have written, made safe to show."""

import pytest

from pipeline.core.text import visible


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
