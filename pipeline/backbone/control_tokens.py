"""Control tokens that a text merely spells, such as `<|im_end|>` in a question about chat templates.

A tokenizer turns each spelling of a special token into that token. In a text that a user wrote it would end the turn or
open another, so it is read as ordinary characters instead. Texts without one are tokenised as ever.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private use: no template changes these characters, and no tokenizer has a rule for them.
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class ControlTokens:
    """The special tokens of a tokenizer, as texts may spell them.

    A mask token is none of them: LLM2Vec makes one of `_`, which ordinary texts hold.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added = {token.content: (token_id, token) for token_id, token in tokenizer.added_tokens_decoder.items()}
        # Some tokenizers do not mark their own EOS as special.
        special = {name for name, (_, token) in added.items() if token.special} | {*tokenizer.all_special_tokens}
        ordinary = {tokenizer.mask_token, tokenizer.unk_token}
        self._tokens = {name: entry for name, entry in added.items() if name in special - ordinary}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return self._any_of(re.escape)

    @cached_property
    def _splitting(self) -> re.Pattern[str]:
        """As `_pattern`, with the white space that a token takes along."""
        return self._any_of(self._with_space)

    def _any_of(self, expression: Callable[[str], str]) -> re.Pattern[str]:
        # The longest first: one may begin another.
        spellings = sorted(self._tokens, key=len, reverse=True)
        return re.compile("|".join(map(expression, spellings)) or r"(?!)")

    def _with_space(self, spelling: str) -> str:
        token = self._tokens[spelling][1]
        return (r"\s*" if token.lstrip else "") + re.escape(spelling) + (r"\s*" if token.rstrip else "")

    def within(self, text: str) -> bool:
        """Whether the text spells a control token."""
        return self._pattern.search(text) is not None

    def encode(self, texts: Sequence[str], held: Sequence[str] | None = None, **options: Any) -> dict[str, list[Any]]:
        """The tokenizer's outputs of several texts; those that spell control tokens are read as ordinary characters.

        Args:
            texts: what is read; at least one.
            held: the part of each that may spell them, where a template without special tokens stands around it.
            options: of the tokenizer.
        """
        encoded: dict[str, list[Any]] = dict(self._tokenizer(list(texts), verbose=False, **options))
        for row, part in enumerate(texts if held is None else held):
            if self.within(part):
                alone = self._tokenizer([texts[row]], verbose=False, split_special_tokens=True, **options)
                for name, rows in encoded.items():
                    rows[row] = alone[name][0]
        return encoded

    def encode_inside(self, render: Callable[[str], str], text: str) -> list[int]:
        """Token ids of `render(text)`, in which only what the template itself writes becomes a control token.

        The parts between the template's tokens are tokenised one by one, as the tokenizer does it within one string.
        """
        free = (char for char in map(chr, _PRIVATE_USE) if char not in text)
        marks = {spelt: next(free) for spelt in dict.fromkeys(self._pattern.findall(text))}
        marked = self._pattern.sub(lambda match: marks[match[0]], text)
        spelt = {ord(mark): control for control, mark in marks.items()}
        rendered, ids, end = render(marked), list[int](), 0
        for match in self._splitting.finditer(rendered):
            ids += self._plain(rendered[end : match.start()], spelt)
            ids += [self._tokens[name][0] for name in self._pattern.findall(match[0])]  # one, with its white space
            end = match.end()
        return ids + self._plain(rendered[end:], spelt)

    def _plain(self, piece: str, spelt: Mapping[int, str]) -> list[int]:
        if not piece:
            return []
        whole = self._tokenizer(
            piece.translate(spelt), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return list(whole["input_ids"])
