"""What every generation engine is: prompts in as token ids, completions out as they finish."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import pyarrow as pa

from pipeline.backbone.loading import BackboneParams
from pipeline.core.schemas import FinishReason

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prompt:
    """One row to complete.

    `seed` makes its sampling independent of its batch; `text` is the user's turn inside `token_ids` and `system` the
    turn before it, for text interfaces.
    """

    id: str
    token_ids: list[int]
    seed: int
    text: str = ""
    system: str | None = None


@dataclass(frozen=True)
class Query:
    """A row to answer: its prompt, the columns of its stored row that the prompt decides, why no engine is asked."""

    prompt: Prompt
    columns: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None


# Makes the queries of a table's rows (`id`, `text`); picklable.
MakeQueries = Callable[[pa.Table], list[Query]]


@dataclass(frozen=True)
class SoftPrompt:
    """A row that begins with vectors `[n, d]` in place of tokens; only vLLM takes it."""

    id: str
    embeds: "torch.Tensor"
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """An engine's answer to one prompt; `error` is the reason where `finish_reason` is "error"."""

    id: str
    text: str
    finish_reason: FinishReason
    response_tokens: int
    error: str | None = None

    @classmethod
    def failed(cls, row_id: str, error: str) -> Self:
        return cls(row_id, "", "error", 0, error)


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    def arguments(self, seed: int) -> dict[str, Any]:
        """The params of a row under the names that vLLM and OpenAI's protocol share; a greedy row has no seed."""
        arguments = {"max_tokens": self.max_new_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return arguments | ({"seed": seed} if self.temperature else {})


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is loaded with; each reads what it needs.

    Attributes:
        max_model_len: positions of a prompt and its answer together.
        token_bytes: bytes of a token in the KV cache; None if unknown.
        tensor_parallel: GPUs that the model is split over.
        batch_invariant: answers do not depend on which rows share a batch.
        memory_share: part of the machine's free memory that this engine may use, 0 to 1.
    """

    backbone: BackboneParams
    max_model_len: int
    options: Mapping[str, Any] = field(default_factory=dict)
    token_bytes: int | None = None
    tensor_parallel: int = 1
    batch_invariant: bool = False
    memory_share: float = 1.0


class Engine(Protocol):
    """A loaded backbone that completes prompts; `contextlib.closing` frees it."""

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Yield one completion a prompt, in any order, as soon as each is finished.

        A prompt that fails yields a completion with `finish_reason` "error". Raises EngineError if the engine broke.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class TextEngine(Engine, Protocol):
    """An engine that makes the prompts too, on the machines that answer them."""

    def answer(self, folder: Path, make: MakeQueries, sampling: Sampling) -> Iterator[tuple[Query, Completion]]:
        """Yield the query and the completion of each row of the folder's Parquet files once, in any order.

        Their columns are `id`, `text` and `number`, which counts the rows from 0. The completion of a refused query is
        a failed one. Raises as `generate`.
        """
        ...


class LoadableEngine(Engine, Protocol):
    """The class of an engine in the registry.

    `VERSION` goes up when the same prompt and params may give another answer. `SPEED_OPTIONS` do not change answers;
    they stay out of fingerprints and manifests.
    """

    VERSION: ClassVar[int]
    SPEED_OPTIONS: ClassVar[frozenset[str]]

    @classmethod
    def load(cls, setup: EngineSetup) -> Self:
        """Start the engine; raises EngineError, or BackboneError if the backbone cannot be loaded."""
        ...
