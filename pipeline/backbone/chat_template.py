"""A tokenizer's chat template around one user turn, behind a system turn if there is one, checked before it is used.

Templates are programs that others wrote. Some print only content parts and drop a plain string; some print today's
date, so that equal work differs from day to day; some fail on a wrong argument.
"""

import inspect
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import BackboneError, describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Key of `chat_template_kwargs` that stands for today: the name of the function by which templates ask for it.
TODAY = "strftime_now"
# Template variables that are arguments of `apply_chat_template` too.
_VARIABLES = {"tools", "documents", "kwargs"}
PROBES = ("Copper 7315", "Velvet 2846")
_TWO_DAYS = (date(2001, 2, 3), date(2023, 11, 28))


class ChatTemplate:
    """Renders a text as the user's turn, and the start of the assistant's."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", kwargs: Mapping[str, Any], system: str | None = None
    ) -> None:
        """Render a few texts.

        Args:
            tokenizer: has the template.
            kwargs: variables of the template; `strftime_now: "2026-11-29"` is what a template gets as today's date.
            system: the system turn; None: none, of which some templates make one of their own.

        Raises:
            BackboneError: there is no template, it fails, it leaves the text or the system turn out, or it prints
                today's date.
        """
        self._tokenizer = tokenizer
        self._name = f"the chat template of '{tokenizer.name_or_path}'"
        if not tokenizer.chat_template:
            raise BackboneError(
                f"tokenizer of '{tokenizer.name_or_path}' has no chat template: use an instruct model, or template raw"
            )
        reserved = {*inspect.signature(tokenizer.apply_chat_template).parameters, "conversations", "messages"}
        if taken := sorted(kwargs.keys() & (reserved - _VARIABLES)):
            raise BackboneError(f"chat_template_kwargs may not set {', '.join(taken)}: the pipeline itself does")
        self._today = _as_date(kwargs.get(TODAY))
        self._kwargs = {key: value for key, value in kwargs.items() if key != TODAY}
        self._system: str | None = None
        self._in_parts = self._wants_parts()
        if system is not None:
            self._system = system
            self._check_system(system)
        self._check_date()

    def render(self, text: str) -> str:
        """The whole prompt as a string; raises BackboneError if the template fails."""
        return self._render(text, self._today, in_parts=self._in_parts)

    def _render(self, text: str, today: date | None, *, in_parts: bool) -> str:
        turns = {} if self._system is None else {"system": self._system}
        messages = [
            {"role": role, "content": [{"type": "text", "text": content}] if in_parts else content}
            for role, content in (turns | {"user": text}).items()
        ]
        clock = {} if today is None else {TODAY: datetime.combine(today, time()).strftime}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=True,
                    **self._kwargs,
                    **clock,
                )
            )
        except Exception as error:  # whatever a template does is for its user to read
            given = f" with chat_template_kwargs {self._kwargs}" if self._kwargs else ""
            raise BackboneError(f"{self._name} fails{given}: {describe(error)}") from error

    def _wants_parts(self) -> bool:
        """Whether the text must be given as a content part; BackboneError if it is left out either way."""
        failures = []
        for in_parts in (False, True):
            try:
                prompts = [self._render(text, self._today, in_parts=in_parts) for text in PROBES]
            except BackboneError as error:
                failures.append(error)
                continue
            # A template may change a text's case; one that prints a part with its keys does not read it.
            held = all(text.lower() in prompt.lower() for text, prompt in zip(PROBES, prompts, strict=True))
            if held and prompts[0] != prompts[1] and not (in_parts and "'type'" in prompts[0]):
                return in_parts
        if len(failures) == 2:
            raise failures[0]
        raise BackboneError(
            f"{self._name} leaves the user's text out: {prompts[0]!r} for {PROBES[0]!r}, whether it is a string or "
            "a content part. Use another tokenizer or template raw"
        )

    def _check_system(self, system: str) -> None:
        try:
            prompt = self.render(PROBES[0])
        except BackboneError as error:
            raise BackboneError(f"{error.message}; without a system turn it does not", argument="system") from error
        if not all(turn.strip().lower() in prompt.lower() for turn in (system, PROBES[0])):
            raise BackboneError(f"{self._name} leaves a turn out: {prompt!r} for {system!r}", argument="system")

    def _check_date(self) -> None:
        if self._today is not None:
            return
        first, second = (self._render(PROBES[0], day, in_parts=self._in_parts) for day in _TWO_DAYS)
        if first != second:
            raise BackboneError(
                f"{self._name} prints today's date, so prompts would change from day to day: fix it in "
                f'chat_template_kwargs, by the template\'s own variable or by {TODAY}: "{date.today().isoformat()}"'
            )


def _as_date(value: Any) -> date | None:
    if value is None:
        return None
    try:
        return date.fromisoformat(value)
    except (TypeError, ValueError):
        message = f"{TODAY} in chat_template_kwargs is {value!r}, no date: write it as '2026-11-29', in quotes"
        raise BackboneError(message) from None
