"""How a text becomes the tokens that a language model reads, and which of them are pooled.

A template holds `{text}` at least once. Tokens are pooled from the last `{text}` to the end of the template:

    "<|user|>{text}<|end|>"     a chat turn; its closing token is pooled too
    echo (Springer et al. 2024)  only the second reading is pooled, for which a causal model has the whole text
    one-word (PromptEOL, Jiang et al. 2023)  pooled by `last`: the state that predicts the word

Special tokens that the tokenizer adds are read and not pooled, except with `mean-all`. Control tokens that a text
spells are read as ordinary characters, unless the template itself holds some.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pipeline.backbone.control_tokens import ControlTokens
from pipeline.backbone.prompting import ECHO, SLOT
from pipeline.core.errors import TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pooling = Literal["mean", "mean-all", "last"]

TEMPLATES = {
    "text": SLOT,
    "echo": ECHO,
    "one-word": f'This sentence : "{SLOT}" means in one word:"',
}


def template_of(value: Any) -> Any:
    """The template that a name of `TEMPLATES` stands for; anything else as it is."""
    return TEMPLATES.get(value, value) if isinstance(value, str) else value


class Tokens(NamedTuple):
    """Token ids that are read, and which of them are pooled (1) or not (0)."""

    ids: list[int]
    pooled: list[int]


class TemplateTokenizer:
    """Turns texts into tokens, at most `max_tokens` each; a longer text loses its end, in each slot of the template."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_tokens: int,
        template: str = SLOT,
        pooling: Pooling = "mean",
        strip: bool = False,
        special_tokens: bool = True,
    ) -> None:
        """Raises TeacherError if the template has no slot, leaves no room for a text, or needs a fast tokenizer.

        Args:
            tokenizer: a fast one where the template is more than the text (it needs character offsets).
            max_tokens: limit that includes special tokens and template.
            template: see the module.
            pooling: `mean`: tokens from the last slot on; `mean-all`: all tokens; `last`: the last token of `mean`.
            strip: remove white space at both ends of a text.
            special_tokens: let the tokenizer add its own; False where the template holds them, as a chat template does.
        """
        self._tokenizer, self.max_tokens = tokenizer, max_tokens
        self.identity = {"template": template, "pooling": pooling, "max_tokens": max_tokens}
        tokenizer.truncation_side = "right"
        self._parts, self._pooling, self._strip = template.split(SLOT), pooling, strip
        self._special_tokens = special_tokens
        self._slots = len(self._parts) - 1
        self._bare = self._parts == ["", ""]
        self._control = ControlTokens(tokenizer)
        self._holds_control = any(map(self._control.within, self._parts))
        if self._slots < 1:
            raise TeacherError(f"template {template!r} holds no {SLOT}")
        if not self._bare and not tokenizer.is_fast:
            raise TeacherError(f"template {template!r}: the tokenizer of '{tokenizer.name_or_path}' gives no offsets")
        self._overhead = self._lengths([""])[0]
        if self._overhead + self._slots > max_tokens:
            raise TeacherError(
                f"{max_tokens} leaves no room for a text: template and special tokens take {self._overhead}",
                argument="max_tokens",
            )

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text. A text without tokens reads, and pools, the EOS token."""
        texts = self._prepared(texts)
        if self._bare:
            return self._tokens(texts, texts)
        lengths = self.lengths(texts)
        short = [
            self._cut(text) if length > self.max_tokens else text for text, length in zip(texts, lengths, strict=True)
        ]
        return self._tokens(short, [self._render(text) for text in short])

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each whole text, with special tokens and template."""
        return self._lengths(self._prepared(texts)) if texts else []

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        rendered = [self._render(text) for text in texts]
        encoded = self._encode(texts, rendered, add_special_tokens=self._special_tokens)
        return [len(ids) for ids in encoded["input_ids"]]

    def _prepared(self, texts: Sequence[str]) -> list[str]:
        return [text.strip() for text in texts] if self._strip else list(texts)

    def _render(self, text: str) -> str:
        return text.join(self._parts)

    def _encode(self, texts: Sequence[str], rendered: Sequence[str], **options: Any) -> dict[str, list[Any]]:
        return self._control.encode(rendered, [] if self._holds_control else texts, **options)

    def _cut(self, text: str) -> str:
        encoded = self._encode([text], [text], add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"][0]]
        count = min((self.max_tokens - self._overhead) // self._slots, len(ends))
        while count > 0:
            beginning = text[: ends[count - 1]]
            excess = self._lengths([beginning])[0] - self.max_tokens
            if excess <= 0:
                return beginning
            count -= math.ceil(excess / self._slots)
        return ""

    def _tokens(self, texts: Sequence[str], rendered: Sequence[str]) -> list[Tokens]:
        if not rendered:
            return []
        encoded = self._encode(
            texts,
            rendered,
            add_special_tokens=self._special_tokens,
            truncation=True,
            max_length=self.max_tokens,
            return_special_tokens_mask=True,
            return_offsets_mapping=not self._bare,
        )
        rows = []
        for index, ids in enumerate(encoded["input_ids"]):
            own = [1 - flag for flag in encoded["special_tokens_mask"][index]]
            if not self._bare:
                # A token across the border holds the text's first letters, so it counts as the text's.
                begin = len(rendered[index]) - len(self._parts[-1]) - len(texts[index])
                own = [
                    flag * (end > begin) for flag, (_, end) in zip(own, encoded["offset_mapping"][index], strict=True)
                ]
            rows.append(self._row(list(ids), own))
        return rows

    def _row(self, ids: list[int], own: list[int]) -> Tokens:
        """`own` is 1 for each token of the last text and of what follows it in the template."""
        if not any(own):
            eos = self._tokenizer.eos_token_id
            ids, own = [*ids, 0 if eos is None else int(eos)], [*own, 1]
        if self._pooling == "mean-all":
            return Tokens(ids, [1] * len(ids))
        if self._pooling == "last":
            last = len(own) - 1 - own[::-1].index(1)
            return Tokens(ids, [int(position == last) for position in range(len(own))])
        return Tokens(ids, own)
