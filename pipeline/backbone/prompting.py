"""From an instruction and a text to the token ids of one prompt, and from prompts to padded batches."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.backbone.chat_template import PROBES, ChatTemplate
from pipeline.backbone.control_tokens import ControlTokens
from pipeline.backbone.loading import Keep, Template
from pipeline.backbone.token_ids import token_ids
from pipeline.core.errors import BackboneError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def join_instruction(instruction: str, text: str) -> str:
    """`instruction`, a space and `text`; the text alone where the instruction is empty."""
    return f"{instruction} {text}" if instruction else text


@dataclass(frozen=True)
class FormattedPrompt:
    """Token ids of a prompt, whether its text was truncated, the remaining text, whether it spells control tokens."""

    token_ids: list[int]
    truncated: bool
    text: str
    control_tokens: bool = False


class PromptFormatter:
    """Turns a text into the backbone's prompt tokens, at most `max_tokens` of them.

    `raw` is the text with the tokenizer's special tokens (as the paper trains); `chat` is the chat template with the
    text as the user's turn and the start of the assistant's. Of a longer text the side `keep` is kept; the template
    stays whole. A control token that a text spells is read as ordinary characters.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: Template,
        max_tokens: int,
        chat_template_kwargs: dict[str, Any] | None = None,
        keep: Keep = "start",
    ) -> None:
        """Raises BackboneError if the chat template cannot be used (see `ChatTemplate`) or alone exceeds the limit."""
        self._tokenizer, self._template, self._max_tokens, self.keep = tokenizer, template, max_tokens, keep
        self._control = ControlTokens(tokenizer)
        self._chat = ChatTemplate(tokenizer, chat_template_kwargs or {}) if template == "chat" else None
        empty, first, second = self._ids(["", *PROBES])
        if first == second:
            name = tokenizer.name_or_path
            raise BackboneError(f"the tokenizer of '{name}' reads {PROBES[0]!r} and {PROBES[1]!r} as the same tokens")
        self._overhead = len(empty)
        if self._overhead >= max_tokens:
            raise BackboneError(
                f"the {template} template alone takes {self._overhead} tokens, the limit is {max_tokens}: raise it",
                argument="max_tokens",
            )

    def __call__(self, text: str) -> FormattedPrompt:
        return self.batch([text])[0]

    @property
    def frame(self) -> str:
        """What the chat template writes around an empty text; "" without one."""
        return "" if self._chat is None else self._chat.render("")

    def batch(self, texts: Sequence[str], prefix: str = "") -> list[FormattedPrompt]:
        """The prompts of several texts, tokenised together, each with `prefix` in front, which is never truncated.

        Raises:
            BackboneError: `prefix` leaves a long text no room.
        """
        if not texts:
            return []
        # Four characters a token is already long; beyond this bound tokenising the rest is wasted work.
        limit = 64 * self._max_tokens
        wholes = [prefix + text for text in texts]
        if self.keep == "start":
            bounded = [whole[:limit] for whole in wholes]
        else:
            bounded = [prefix + text[-limit:] for text in texts]
        return [
            FormattedPrompt(ids, len(left) < len(whole), left, self._control.within(left))
            if len(ids) <= self._max_tokens
            else self._cut(left, prefix)
            for whole, left, ids in zip(wholes, bounded, self._ids(bounded), strict=True)
        ]

    def _cut(self, text: str, prefix: str) -> FormattedPrompt:
        if self.keep == "start":
            offsets = self._offsets(text)
            return self._fitted(self._overhead, len(offsets), lambda count: text[: offsets[count - 1][1]], "")
        taken = len(self._ids([prefix])[0])
        if taken >= self._max_tokens:
            raise BackboneError(
                f"the instruction {prefix!r} takes {taken} tokens, template included, the limit is {self._max_tokens}, "
                "which leaves none for a text that keeps its end: shorten the instruction or raise the limit"
            )
        body = text[len(prefix) :]
        offsets = self._offsets(body)
        return self._fitted(taken, len(offsets), lambda count: prefix + body[offsets[-count][0] :], prefix)

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of the text begins and ends; of a slow tokenizer, which does not say it, each character."""
        if not self._tokenizer.is_fast:
            return [(at, at + 1) for at in range(len(text))]
        encoded = self._control.encode([text], add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["offset_mapping"][0])

    def _fitted(self, taken: int, total: int, left: Callable[[int], str], nothing: str) -> FormattedPrompt:
        """`left(count)`, the text with `count` of its `total` pieces, for the largest that fits; else `nothing`."""
        if self._tokenizer.is_fast:
            count = min(self._max_tokens - taken, total)
            while count > 0 and (excess := self._length(left(count)) - self._max_tokens) > 0:
                count -= excess
        else:
            count = bisect_right(range(1, total + 1), self._max_tokens, key=lambda count: self._length(left(count)))
        text = left(count) if count > 0 else nothing
        return FormattedPrompt(self._ids([text])[0], True, text, self._control.within(text))

    def _length(self, text: str) -> int:
        return len(self._ids([text])[0])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self._chat is None:
            return self._control.encode(texts)["input_ids"]
        rendered = [self._chat.render(text) for text in texts]
        ids = token_ids(self._tokenizer, rendered, add_special_tokens=False)
        for row, text in enumerate(texts):
            if self._control.within(text):
                ids[row] = self._control.encode_inside(self._chat.render, text)
        return ids


def eos_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The tokenizer's end-of-sequence token; BackboneError if it has none."""
    if tokenizer.eos_token_id is None:
        raise BackboneError(f"tokenizer of '{tokenizer.name_or_path}' has no EOS token")
    return int(tokenizer.eos_token_id)


def pad_left(rows: Sequence[Sequence[int]], fill: int = 0) -> "tuple[torch.Tensor, torch.Tensor]":
    """Rows of token ids as `(input_ids, attention_mask)`, both int64 [B, T], padded on the left.

    Needs no pad token: padded positions are masked.
    """
    return _pad(rows, fill, left=True)


def pad_right(rows: Sequence[Sequence[int]], fill: int = 0) -> "tuple[torch.Tensor, torch.Tensor]":
    """As `pad_left`, on the right."""
    return _pad(rows, fill, left=False)


def _pad(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> "tuple[torch.Tensor, torch.Tensor]":
    import torch

    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, span] = torch.tensor(row, dtype=torch.long)
        mask[index, span] = 1
    return ids, mask
