"""A stub for tests and dry runs of the pipeline: answers with the prompt itself and says that it is a stub."""

import time
from collections.abc import Callable, Iterable, Iterator

from pydantic import Field

from pipeline.backbone.loading import BackboneParams, load_tokenizer
from pipeline.core.config import Params
from pipeline.generate.engines.base import Completion, Prompt, Sampling

VERSION = 1
SPEED_OPTIONS = frozenset({"delay"})


class EchoOptions(Params):
    """`generate.options` of this engine."""

    delay: float = Field(default=0.0, ge=0, description="seconds that a row takes")


class EchoEngine:
    """Writes "stub answer: " and the prompt's text, cut to `max_new_tokens` prompt tokens.

    An answer depends on its prompt alone, so it is the same in every batch and after every resume.
    """

    def __init__(self, decode: Callable[[list[int]], str], delay: float = 0.0) -> None:
        """`decode` turns token ids into text; `delay` is the time in seconds that a row takes."""
        self._decode, self._delay = decode, delay

    @classmethod
    def load(cls, backbone: BackboneParams, delay: float = 0.0) -> "EchoEngine":
        """An echo that decodes with the backbone's tokenizer; the model itself is not loaded."""
        tokenizer = load_tokenizer(backbone)
        return cls(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), delay)

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Engine.generate`."""
        for prompt in prompts:
            if self._delay:
                time.sleep(self._delay)
            kept = prompt.token_ids[: sampling.max_new_tokens]
            yield Completion(
                id=prompt.id,
                text=f"stub answer: {self._decode(kept)}",
                finish_reason="stop" if len(kept) == len(prompt.token_ids) else "length",
                response_tokens=len(kept),
            )

    def close(self) -> None:
        """Nothing to free."""
