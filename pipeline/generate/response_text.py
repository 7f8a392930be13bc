"""Defects of an answer's text: a thinking block before it, and a repetition loop at its end."""

from collections.abc import Iterator

_START, _END = "<think>", "</think>"

# A loop is an ending of at least COPIES copies of a piece and at least LOOP_CHARS characters.
COPIES = 4
LOOP_CHARS = 100
LONGEST_PIECE = 500
_KEY_CHARS = 16


def strip_thinking(text: str, *, opened: bool = False, cut: bool = False) -> str:
    """`text` without its leading `<think>` block and the space around it.

    A block without an end is the whole text. `opened`: the prompt opened the block already, as some templates do; then
    `cut` (the answer ended at the token limit) shows one without an end. Later tags belong to the answer.
    """
    begins = text.lstrip().startswith(_START)
    if not begins and not (opened and (cut or _END in text)):
        return text
    return text.partition(_END)[2].strip()


def ends_in_loop(text: str) -> bool:
    """Whether `text` ends in a loop, as degenerate greedy decoding does.

    True if its last `LOOP_CHARS` or more characters are at least `COPIES` copies of one piece of at most
    `LONGEST_PIECE` characters; the first and last may be cut. Copies must be equal, so a counter is no loop.
    """
    text = text.rstrip()
    if len(text) < LOOP_CHARS:
        return False
    return any(_repeats(text, max(COPIES * period, LOOP_CHARS), period) for period in _periods(text))


def _repeats(text: str, length: int, period: int) -> bool:
    """Whether the last `length` characters each equal the one `period` before."""
    end = text[-length:]
    return len(end) == length and end[:-period] == end[period:]


def _periods(text: str) -> Iterator[int]:
    """Distances at which the last few characters recur, nearest first: a loop has one of these periods."""
    key = text[-_KEY_CHARS:]
    first = max(0, len(text) - len(key) - LONGEST_PIECE)
    at = text.rfind(key, first, len(text) - 1)
    while at >= 0:
        yield len(text) - len(key) - at
        at = text.rfind(key, first, at + len(key) - 1)
