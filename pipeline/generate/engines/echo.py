"""A stub for tests and dry runs: answers with the prompt itself."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Self

from pydantic import Field

from pipeline.backbone.loading import load_tokenizer
from pipeline.core.config import Params
from pipeline.core.schemas import FinishReason
from pipeline.generate.engines.base import Completion, EngineSetup, Prompt, Sampling
from pipeline.generate.engines.checks import parse_options


class EchoOptions(Params):
    """Options of this engine."""

    delay: float = Field(default=0.0, ge=0, description="seconds that a row takes")


class EchoEngine:
    """Writes "stub answer: " and the prompt's text, cut to `max_new_tokens` prompt tokens.

    The answer depends on its prompt alone; the backbone's tokenizer decodes it, the model is not loaded.
    """

    VERSION: ClassVar[int] = 1
    SPEED_OPTIONS: ClassVar[frozenset[str]] = frozenset(EchoOptions.model_fields)

    def __init__(self, decode: Callable[[list[int]], str], delay: float = 0.0) -> None:
        self._decode, self._delay = decode, delay

    @classmethod
    def load(cls, setup: EngineSetup) -> Self:
        delay = parse_options(setup.options, EchoOptions).delay
        tokenizer = load_tokenizer(setup.backbone)
        return cls(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), delay)

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        for prompt in prompts:
            if self._delay:
                time.sleep(self._delay)
            kept = prompt.token_ids[: sampling.max_new_tokens]
            reason: FinishReason = "stop" if len(kept) == len(prompt.token_ids) else "length"
            yield Completion(prompt.id, f"stub answer: {self._decode(kept)}", reason, len(kept))

    def close(self) -> None:
        """Nothing to free."""
