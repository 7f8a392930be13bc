"""How a text becomes the tokens that a language model reads, and which of them are pooled.

A template holds `{text}` one or more times, or is a name of `TEMPLATES`. What is pooled begins at the last one and ends
where the template ends:

    "{text}"                                                   the text alone
    "<|start_header_id|>user<|end_header_id|>\\n\\n{text}<|eot_id|>"   a frame; what closes it is pooled too
    "Rewrite the sentence: {text}, rewritten sentence: {text}"  echo (Springer et al. 2024): only the second reading is
                                                               pooled, in which a causal model has seen the whole text
    'This sentence : "{text}" means in one word:"'              one-word (PromptEOL, Jiang et al. 2023), pooled by
                                                               `last`: the state that would name the word

Special tokens that the tokenizer itself puts around are read and not pooled, except with `mean-all`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pipeline.core.errors import TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pooling = Literal["mean", "mean-all", "last"]

SLOT = "{text}"

TEMPLATES = {
    "text": SLOT,
    "echo": f"Rewrite the sentence: {SLOT}, rewritten sentence: {SLOT}",
    "one-word": f'This sentence : "{SLOT}" means in one word:"',
}


def template_of(value: Any) -> Any:
    """The template that a name of `TEMPLATES` stands for; anything else as it is."""
    return TEMPLATES.get(value, value) if isinstance(value, str) else value


class Tokens(NamedTuple):
    """Token ids that are read, and which of them are pooled (1) or not (0)."""

    ids: list[int]
    pooled: list[int]


class Reader:
    """Turns texts into tokens, at most `max_tokens` each; of a text that is too long the end is left out.

    The template stays whole, and with an echo each reading loses the same end.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_tokens: int,
        template: str = SLOT,
        pooling: Pooling = "mean",
        strip: bool = False,
    ) -> None:
        """Set the rules.

        Args:
            tokenizer: a fast one where the template is more than the text (it needs character offsets).
            max_tokens: limit of the whole, special tokens and template included.
            template: see the module.
            pooling: `mean` over the tokens from the last text on, `mean-all` over every token, special ones included,
                `last` the last of the tokens that `mean` averages: the text's own last, or the template's closing one.
            strip: take white space off both ends of a text.

        Raises:
            TeacherError: the template has no slot, leaves no room for a text, or needs a fast tokenizer.
        """
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        tokenizer.truncation_side = "right"
        self._parts, self._pooling, self._strip = template.split(SLOT), pooling, strip
        self._slots = len(self._parts) - 1
        self._counted: tuple[list[str], list[int]] = [], []
        self._bare = self._parts == ["", ""]
        if self._slots < 1:
            raise TeacherError(f"embed.teacher.template: {template!r} holds no {SLOT}")
        if not self._bare and not tokenizer.is_fast:
            raise TeacherError(f"embed.teacher.template: the tokenizer of '{tokenizer.name_or_path}' gives no offsets")
        self._overhead = len(tokenizer("".join(self._parts))["input_ids"])
        if self._overhead + self._slots > max_tokens:
            raise TeacherError(
                f"embed.teacher.max_tokens ({max_tokens}) leaves no room for a text: "
                f"the template and special tokens take {self._overhead}"
            )

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text. A text without tokens reads, and pools, the EOS token."""
        texts = self._prepared(texts)
        if self._bare:
            return self._tokens(texts, texts)
        kept = [
            self._cut(text) if length > self._max_tokens else text
            for text, length in zip(texts, self._lengths(texts), strict=True)
        ]
        return self._tokens(kept, [self._render(text) for text in kept])

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens are read of each text, special tokens and template counted."""
        return [min(length, self._max_tokens) for length in self._lengths(self._prepared(texts))]

    def truncated(self, texts: Sequence[str]) -> list[bool]:
        """Which texts lose their end, special tokens and template counted."""
        return [length > self._max_tokens for length in self._lengths(self._prepared(texts))]

    def _prepared(self, texts: Sequence[str]) -> list[str]:
        return [text.strip() for text in texts] if self._strip else list(texts)

    def _render(self, text: str) -> str:
        return text.join(self._parts)

    def _lengths(self, texts: list[str]) -> list[int]:
        """Tokens of the whole of each text; those asked for last are remembered, as one is asked for several facts."""
        if texts != self._counted[0]:
            rows = self._tokenizer([self._render(text) for text in texts], verbose=False)["input_ids"] if texts else []
            self._counted = texts, [len(ids) for ids in rows]
        return self._counted[1]

    def _cut(self, text: str) -> str:
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in offsets["offset_mapping"]]
        count = min((self._max_tokens - self._overhead) // self._slots, len(ends))
        while count > 0:
            kept = text[: ends[count - 1]]
            excess = len(self._tokenizer(self._render(kept))["input_ids"]) - self._max_tokens
            if excess <= 0:
                return kept
            count -= math.ceil(excess / self._slots)
        return ""

    def _tokens(self, texts: Sequence[str], rendered: Sequence[str]) -> list[Tokens]:
        if not rendered:
            return []
        encoded = self._tokenizer(
            list(rendered),
            truncation=True,
            max_length=self._max_tokens,
            return_special_tokens_mask=True,
            return_offsets_mapping=not self._bare,
            verbose=False,
        )
        rows = []
        for index, ids in enumerate(encoded["input_ids"]):
            begin = len(rendered[index]) - len(self._parts[-1]) - len(texts[index])
            rows.append(self._row(list(ids), self._own(encoded, index, begin)))
        return rows

    def _own(self, encoded: Any, index: int, begin: int) -> list[int]:
        """Which tokens belong to the last text or to what follows it in the template."""
        own = [1 - flag for flag in encoded["special_tokens_mask"][index]]
        if self._bare:
            return own
        # A token may straddle the border: it holds the text's first letters, so it counts as the text's.
        return [
            flag if end > begin else 0 for flag, (_, end) in zip(own, encoded["offset_mapping"][index], strict=True)
        ]

    def _row(self, ids: list[int], own: list[int]) -> Tokens:
        if not any(own):
            eos = self._tokenizer.eos_token_id
            ids, own = [*ids, 0 if eos is None else int(eos)], [*own, 1]
        if self._pooling == "mean-all":
            return Tokens(ids, [1] * len(ids))
        if self._pooling == "last":
            last = len(own) - 1 - own[::-1].index(1)
            return Tokens(ids, [int(position == last) for position in range(len(own))])
        return Tokens(ids, own)
