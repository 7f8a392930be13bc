"""What every generation engine is: prompts in as token ids, completions out as they finish."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.core.schemas import FinishReason

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prompt:
    """One row to complete.

    `seed` makes sampling of this row independent of its batch. `text` is the user's turn inside `token_ids`, for
    engines behind an interface that takes texts only.
    """

    id: str
    token_ids: list[int]
    seed: int
    text: str = ""


@dataclass(frozen=True)
class SoftPrompt:
    """A row to complete that begins with vectors `[n, d]` in place of tokens; only some engines take it."""

    id: str
    embeds: "torch.Tensor"
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What an engine wrote for one prompt. `error` says why where `finish_reason` is "error"."""

    id: str
    text: str
    finish_reason: FinishReason
    response_tokens: int
    error: str | None = None


@dataclass(frozen=True)
class Sampling:
    """Decoding params: greedy at temperature 0."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


class Engine(Protocol):
    """A loaded backbone that completes prompts; used as a context manager, which frees it."""

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion a prompt, in any order, as soon as each is finished.

        A prompt that fails yields a completion with `finish_reason` "error"; the others go on.

        Raises:
            EngineError: the engine itself broke.
        """
        ...

    def close(self) -> None:
        """Free its processes and memory."""
        ...
