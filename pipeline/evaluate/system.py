"""What an evaluation compares: the Protocol `System`, and wrappers of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.backbone.prompting import join_instruction
from pipeline.core.artifacts import digest_of
from pipeline.core.errors import EvaluationError
from pipeline.tasks.instructions import Side

if TYPE_CHECKING:
    import numpy as np

    from pipeline.embed.teachers.base import Teacher
    from pipeline.encoder.inference import Encoder
    from pipeline.encoder.pool import ParallelEncoder


SystemName = str  # one of `params.BUILT_IN`, or a key of `evaluate.models`

VERSION = 1  # raise it when the same weights embed differently: finished scores are then not taken over

GENERATIVE = "generative instruction"
BARE = "bare text"


class System(Protocol):
    """An embedder under comparison.

    Attributes:
        name: unique among the compared.
        identity: what pins its weights (serialises to JSON).
        prompting: what it reads besides the text.
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def prompting(self) -> str: ...

    def reading(self, text: str, instruction: str, side: Side) -> str:
        """What is read of a text: equal readings of one system have equal embeddings."""
        ...

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> "np.ndarray[Any, Any]":
        """Embeddings float32 [len(texts), d], compared by cosine."""
        ...


def revision_of(system: System, **conditions: Any) -> str:
    """40 hex digits that change with a system's weights, its prompting or the `conditions` of a score."""
    return digest_of({"version": VERSION, "identity": system.identity, "prompting": system.prompting, **conditions})[
        :40
    ]


def failures(system: System) -> int:
    """Texts so far that a system embedded for want of something better, which another time it may have."""
    return int(getattr(getattr(system, "system", system), "failed", 0))  # an embedding cache wraps the system


def check_finite(embeddings: "np.ndarray[Any, Any]", texts: Sequence[str], where: str) -> None:
    """Raises EvaluationError if one of the embeddings [len(texts), d] is not finite."""
    import numpy as np

    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        raise EvaluationError(
            f"{where}: {len(bad)} of {len(texts)} embeddings are not finite, first: {texts[bad[0]][:80]!r}"
        )


@dataclass(frozen=True)
class InstructedSystem:
    """An encoder that reads the instruction before the text."""

    name: str
    identity: dict[str, Any]
    encoder: "Encoder | ParallelEncoder"
    batch_tokens: int | None = None
    prompting: str = GENERATIVE

    def reading(self, text: str, instruction: str, side: Side) -> str:
        """Instruction and text; the instruction already says which side it is."""
        return join_instruction(instruction, text)

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> "np.ndarray[Any, Any]":
        """Embeddings float32 [len(texts), d] of instruction + text."""
        return self.encoder.encode(texts, instruction=instruction, batch_tokens=self.batch_tokens)


@dataclass(frozen=True)
class BareSystem:
    """A teacher, which reads the text without the instruction."""

    name: str
    identity: dict[str, Any]
    teacher: "Teacher"
    prompting: str = BARE

    def reading(self, text: str, instruction: str, side: Side) -> str:
        """The text alone."""
        return text

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> "np.ndarray[Any, Any]":
        """Embeddings float32 [len(texts), d] of the text; `instruction` is not used."""
        return self.teacher.embed(texts)
