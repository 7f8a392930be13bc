"""From an instruction and a text to the token ids of one prompt, and from prompts to padded batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.backbone.loading import Keep, Template
from pipeline.core.errors import BackboneError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def join_instruction(instruction: str, text: str) -> str:
    """`instruction`, a space and `text`; the text alone where the instruction is empty."""
    return f"{instruction} {text}" if instruction else text


@dataclass(frozen=True)
class FormattedPrompt:
    """Token ids of a prompt, whether its text was truncated, and the remaining text."""

    token_ids: list[int]
    truncated: bool
    text: str


class PromptFormatter:
    """Turns a text into the backbone's prompt tokens, at most `max_tokens` of them.

    `raw` is the text with the tokenizer's special tokens (as the paper trains); `chat` is the chat template with the
    text as the user's turn and the start of the assistant's. Of a longer text the side `keep` is kept; the template
    stays whole.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: Template,
        max_tokens: int,
        chat_template_kwargs: dict[str, Any] | None = None,
        keep: Keep = "start",
    ) -> None:
        """Raises BackboneError if the tokenizer has no chat template, or the template alone exceeds `max_tokens`."""
        self._tokenizer, self._template, self._max_tokens = tokenizer, template, max_tokens
        self._kwargs, self.keep = chat_template_kwargs or {}, keep
        if template == "chat" and not tokenizer.chat_template:
            raise BackboneError(
                f"tokenizer of '{tokenizer.name_or_path}' has no chat template: use an instruct model, or template raw"
            )
        self._overhead = len(self._ids([""])[0])
        if self._overhead >= max_tokens:
            raise BackboneError(
                f"the {template} template alone takes {self._overhead} tokens, the limit is {max_tokens}: raise it",
                argument="max_tokens",
            )

    def __call__(self, text: str) -> FormattedPrompt:
        return self.batch([text])[0]

    @property
    def opens_thinking(self) -> bool:
        """Whether the prompt ends within a `<think>` block."""
        return self._template == "chat" and self._render("").rstrip().endswith("<think>")

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
            FormattedPrompt(ids, len(left) < len(whole), left)
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
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(encoding["offset_mapping"])

    def _fitted(self, taken: int, total: int, left: Callable[[int], str], nothing: str) -> FormattedPrompt:
        """`left(count)`, the text with `count` of its `total` tokens, for the largest that fits; else `nothing`."""
        count = min(self._max_tokens - taken, total)
        while count > 0:
            text = left(count)
            (ids,) = self._ids([text])
            if len(ids) <= self._max_tokens:
                return FormattedPrompt(ids, True, text)
            count -= len(ids) - self._max_tokens
        return FormattedPrompt(self._ids([nothing])[0], True, nothing)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self._template == "raw":
            return list(self._tokenizer(list(texts), verbose=False)["input_ids"])
        rendered = [self._render(text) for text in texts]
        return list(self._tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])

    def _render(self, text: str) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, **self._kwargs
            )
        )


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
