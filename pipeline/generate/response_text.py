"""Defects of an answer's text: thinking before it, and a repetition loop at its end."""

import re
from collections.abc import Iterator

# What opens and what ends thinking, by family of models.
_BLOCKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
)
# Harmony's channels with their control tokens left out, as decoding leaves them out.
_BARE_CHANNEL, _BARE_FINAL = re.compile(r"analysis(?=[A-Z])"), "assistantfinal"

# A line that is nothing but the end of a block, or ends with it.
_LONE_END = re.compile("(?:" + "|".join(re.escape(end) for _, end in _BLOCKS) + r")\s*$", re.MULTILINE)

# A loop is an ending of at least COPIES copies of a piece and at least LOOP_CHARS characters.
COPIES = 4
LOOP_CHARS = 100
LONGEST_PIECE = 500
_KEY_CHARS = 16


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends within a block of thinking, as some templates have it."""
    return prompt.rstrip().endswith(tuple(start for start, _ in _BLOCKS))


def thinking(reasoning: str, answer: str | None) -> str:
    """One text of thinking and answer that came apart; without an answer the block has no end."""
    start, end = _BLOCKS[0]
    return f"{start}\n{reasoning}" if answer is None else f"{start}\n{reasoning}\n{end}\n\n{answer}"


def strip_thinking(text: str, *, opened: bool = False, cut: bool = False) -> str:
    """`text` without the thinking at its beginning and the space around it.

    A block without an end is the whole text. `opened`: the prompt opened the block already, as some templates do; then
    `cut` (the answer ended at the token limit) shows one without an end. Later tags belong to the answer.
    """
    begun = text.lstrip()
    for start, end in _BLOCKS:
        if begun.startswith(start) or (opened and end in text):
            return text.partition(end)[2].strip()
    if _BARE_CHANNEL.match(begun) and (cut or _BARE_FINAL in text):
        return text.partition(_BARE_FINAL)[2].strip()
    return "" if opened and cut else text


def looks_like_thinking(text: str) -> bool:
    """Whether an answer still begins with thinking, or a line of it closes a block that nothing opened."""
    return strip_thinking(text, cut=True) != text or _LONE_END.search(text) is not None


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
