"""From an instruction and a text to the token ids of one prompt, and from prompts to padded batches."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from pipeline.backbone.chat_template import PROBES, ChatTemplate
from pipeline.backbone.control_tokens import ControlTokens
from pipeline.backbone.loading import Keep, Template
from pipeline.backbone.token_ids import token_ids
from pipeline.core.errors import BackboneError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


SLOT = "{text}"
ECHO = f"Rewrite the sentence: {SLOT}, rewritten sentence: {SLOT}"
"""A text twice (Springer et al. 2024): a causal model reads the second one with the whole text before it."""


def join_instruction(instruction: str, text: str) -> str:
    """`instruction`, a space and `text`; the text alone where the instruction is empty."""
    return f"{instruction} {text}" if instruction else text


def first_instruction(sources: Iterable[Mapping[str, Any]]) -> str | None:
    """The params key of the first instruction of `collect.sources`, as a manifest holds them; None without any."""
    numbers = (number for number, source in enumerate(sources) if source.get("instruction"))
    return next((f"collect.sources.{number}.instruction" for number in numbers), None)


def check_instructions_stay(too_long: str, sources: Iterable[Mapping[str, Any]]) -> None:
    """Raises BackboneError if a query that loses its start would lose an instruction of `collect.sources`."""
    key = first_instruction(sources)
    if too_long == "keep_end" and key is not None:
        message = f"keep_end cuts {key} off the front of a long query: take keep_start, or leave the instruction out"
        raise BackboneError(message, argument="too_long")


@dataclass(frozen=True)
class FormattedPrompt:
    """A prompt.

    Attributes:
        truncated: whether its text was.
        text: what remained of it.
        control_tokens: whether it spells some.
        second: where the second text stands among the tokens, of the template `echo`; else None.
    """

    token_ids: list[int]
    truncated: bool
    text: str
    control_tokens: bool = False
    second: slice | None = None


class PromptFormatter:
    """Turns a text into the backbone's prompt tokens, at most `max_tokens` of them.

    `raw` is the text with the tokenizer's special tokens (as the paper trains); `chat` is the chat template with the
    text as the user's turn, behind the `system` turn if there is one, and the start of the assistant's; `echo` is that
    with the text in it twice (`ECHO`). Of a longer text the side `keep` is kept; the template stays whole. A control
    token that a text spells is read as ordinary characters.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: Template,
        max_tokens: int,
        chat_template_kwargs: dict[str, Any] | None = None,
        keep: Keep = "start",
        system: str | None = None,
    ) -> None:
        """Raises BackboneError if the chat template cannot be used (see `ChatTemplate`) or alone exceeds the limit."""
        self._tokenizer, self._template, self._max_tokens, self.keep = tokenizer, template, max_tokens, keep
        self.system = system
        self._control = ControlTokens(tokenizer)
        self._twice = template == "echo"
        self._chat = None if template == "raw" else ChatTemplate(tokenizer, chat_template_kwargs or {}, system)
        empty, first, second = self._ids(["", *PROBES])
        if first == second:
            name = tokenizer.name_or_path
            raise BackboneError(f"the tokenizer of '{name}' reads {PROBES[0]!r} and {PROBES[1]!r} as the same tokens")
        self._overhead, self._after = len(empty), shared_suffix(first, second)  # tokens around and after every text
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
        """The prompts of several texts, tokenised together, each with `prefix` in front.

        Where a long text keeps its end, or stands twice, the prefix is never truncated.

        Raises:
            BackboneError: `prefix` leaves a long text no room.
        """
        if not texts:
            return []
        # Four characters a token is already long; beyond this bound tokenising the rest is wasted work.
        limit = 64 * self._max_tokens
        if self.keep == "start" and not self._twice:
            texts, prefix = [prefix + text for text in texts], ""
        bounded = [text[:limit] if self.keep == "start" else text[-limit:] for text in texts]
        prompts = [
            self._prompt(ids, len(left) < len(text), left, prefix)
            if len(ids) <= self._max_tokens
            else self._cut(left, prefix)
            for text, left, ids in zip(texts, bounded, self._ids(bounded, prefix), strict=True)
        ]
        return self._with_second(prompts, prefix) if self._twice else prompts

    def _prompt(self, ids: list[int], truncated: bool, text: str, prefix: str) -> FormattedPrompt:
        return FormattedPrompt(ids, truncated, prefix + text, self._control.within(prefix + text))

    def _with_second(self, prompts: Sequence[FormattedPrompt], prefix: str) -> list[FormattedPrompt]:
        """The second text ends where the template goes on, and has as many tokens as it has alone, behind a space."""
        alone = self._control.encode([f" {prompt.text[len(prefix) :]}" for prompt in prompts], add_special_tokens=False)
        found = []
        for prompt, ids in zip(prompts, alone["input_ids"], strict=True):
            end = len(prompt.token_ids) - self._after
            found.append(replace(prompt, second=slice(max(0, end - max(1, len(ids))), end)))
        return found

    def _cut(self, text: str, prefix: str) -> FormattedPrompt:
        taken = self._length("", prefix) if prefix else self._overhead
        if taken >= self._max_tokens:
            raise BackboneError(
                f"the instruction {prefix!r} takes {taken} tokens, template included, the limit is {self._max_tokens}, "
                "which leaves none for a text: shorten the instruction or raise the limit"
            )
        offsets = self._offsets(text)
        if self.keep == "start":
            return self._fitted(taken, len(offsets), lambda count: text[: offsets[count - 1][1]], prefix)
        return self._fitted(taken, len(offsets), lambda count: text[offsets[-count][0] :], prefix)

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of the text begins and ends; of a slow tokenizer, which does not say it, each character."""
        if not self._tokenizer.is_fast:
            return [(at, at + 1) for at in range(len(text))]
        encoded = self._control.encode([text], add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["offset_mapping"][0])

    def _fitted(self, taken: int, total: int, left: Callable[[int], str], prefix: str) -> FormattedPrompt:
        """`left(count)`, the text with `count` of its `total` pieces, for the largest count that fits; else no text."""
        if self._tokenizer.is_fast:
            copies = 2 if self._twice else 1
            count = min((self._max_tokens - taken) // copies, total)
            while count > 0 and (excess := self._length(left(count), prefix) - self._max_tokens) > 0:
                count -= -(-excess // copies)
        else:
            pieces = range(1, total + 1)
            count = bisect_right(pieces, self._max_tokens, key=lambda count: self._length(left(count), prefix))
        text = left(count) if count > 0 else ""
        return self._prompt(self._ids([text], prefix)[0], True, text, prefix)

    def _length(self, text: str, prefix: str) -> int:
        return len(self._ids([text], prefix)[0])

    def _ids(self, texts: Sequence[str], prefix: str = "") -> list[list[int]]:
        contents = [prefix + (text.join(ECHO.split(SLOT)) if self._twice else text) for text in texts]
        if self._chat is None:
            return self._control.encode(contents)["input_ids"]
        rendered = [self._chat.render(content) for content in contents]
        ids = token_ids(self._tokenizer, rendered, add_special_tokens=False)
        for row, content in enumerate(contents):
            if self._control.within(content):
                ids[row] = self._control.encode_inside(self._chat.render, content)
        return ids


def shared_suffix(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens with which both end."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


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
