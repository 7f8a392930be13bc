"""What an evaluation compares: the Protocol `System`, and the systems that wrap an encoder or a teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from pipeline.backbone.prompting import join_instruction
from pipeline.core.errors import EvaluationError
from pipeline.core.files import digest_of
from pipeline.evaluate.registry import entry_of
from pipeline.tasks.instructions import Side

if TYPE_CHECKING:
    from pipeline.embed.teachers.base import Teacher
    from pipeline.encoder.inference import Encoder
    from pipeline.encoder.pool import ParallelEncoder
    from pipeline.evaluate.embedding_cache import CachedSystem


SystemName = str  # a key of `registry.BUILT_IN` or of `evaluate.models`

VERSION = 2  # raise it when the same weights embed differently: finished scores and embeddings are then not reused

GENERATIVE = "generative instruction"
BARE = "bare text"


class System(Protocol):
    """An embedder under comparison.

    `name` is unique among the compared, `identity` pins its weights (serialises to JSON), `prompting` is what it reads
    besides the text.
    """

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def prompting(self) -> str: ...

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        """A text with all that the system reads besides: equal keys of one system have equal embeddings."""
        ...

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        """Embeddings float32 [len(texts), d], compared by cosine."""
        ...


def revision_of(system: System, **conditions: Any) -> str:
    """40 hex digits that change with a system's weights, its prompting, its rounding or the `conditions` of a score."""
    content = {"version": VERSION, "identity": system.identity, "prompting": system.prompting, **conditions}
    rounded = getattr(system, "embeddings_dtype", "float32")
    if rounded != "float32":
        content["embeddings_dtype"] = rounded
    return digest_of(content)[:40]


def prepare(system: System, texts: Sequence[str], instruction: str, side: Side) -> None:
    """Let a system do once what the texts of a whole call need, before it gets them in chunks."""
    if hasattr(system, "prepare"):
        system.prepare(texts, instruction, side)


def innermost(system: System) -> System:
    """The system that embeds: an embedding cache or a standardisation wraps it."""
    while (inner := getattr(system, "system", None)) is not None:
        system = inner
    return system


def in_teacher_space(system: System) -> bool:
    """Whether embeddings lie in the teacher's space: not those of an encoder that turns or adds to its prediction."""
    entry, config = entry_of(system.name), system.identity.get("config", {})
    return entry is not None and entry.teacher_space and not {"response_share", "rotated_width"} & config.keys()


def failed_texts(system: System) -> int:
    """Texts so far that a system embedded as a fallback after an error that another run may not have."""
    return int(getattr(innermost(system), "failed", 0))


def encode_finite(
    system: System, texts: Sequence[str], instruction: str = "", side: Side = "query", *, where: str
) -> np.ndarray:
    """`System.encode`; raises EvaluationError, which names `where`, if an embedding is not finite."""
    embeddings = np.asarray(system.encode(texts, instruction, side), dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(bad):
        counts, first = f"{len(bad)} of {len(texts)}", texts[bad[0]][:80]
        raise EvaluationError(f"{system.name}, {where}: {counts} embeddings are not finite, first: {first!r}")
    return embeddings


@dataclass(frozen=True)
class InstructedSystem:
    """An encoder that reads the instruction before the text.

    Attributes:
        beside: encoders in this process that read as `encoder`, and the caches that get what they embed with it.
    """

    name: str
    identity: dict[str, Any]
    encoder: "Encoder | ParallelEncoder"
    batch_tokens: int | None = None
    prompting: str = GENERATIVE
    beside: "Sequence[tuple[Encoder, CachedSystem]]" = ()

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        return join_instruction(instruction, text)

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        options: Any = {"instruction": instruction, "batch_tokens": self.batch_tokens}
        if not self.beside:
            return self.encoder.encode(texts, **options)
        encoder = cast("Encoder", self.encoder)
        own, *others = encoder.encode_beside([other for other, _ in self.beside], texts, **options)
        for (_, cached), vectors in zip(self.beside, others, strict=True):
            cached.keep(texts, vectors, instruction, side)
        return own


@dataclass(frozen=True)
class BareSystem:
    """A teacher, which reads the text without the instruction."""

    name: str
    identity: dict[str, Any]
    teacher: "Teacher"
    prompting: str = BARE

    def cache_key(self, text: str, instruction: str, side: Side) -> str:
        return text

    def encode(self, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
        return self.teacher.embed(texts)
