"""The embedders that are compared: the trained student, its teacher, and what the training must beat (`baselines`).

Each is prompted by its own convention, which every result states as `prompting`: a student reads the generative
instruction before the text; the teacher and the backbone's pooling read the bare text (a teacher with a prompt of its
own adds that itself), as they did when they made the targets; HyDE answers the instruction and text; published models
have prompts of their own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.artifacts import digest_of
from pipeline.backbone import DType
from pipeline.encoder.config import fingerprint
from pipeline.errors import EvaluationError
from pipeline.places import places
from pipeline.prompts import Side, join_instruction

if TYPE_CHECKING:
    import numpy as np

    from pipeline.encoder.inference import Encoder
    from pipeline.encoder.parallel import ParallelEncoder
    from pipeline.evaluation.answers import Answers
    from pipeline.evaluation.baselines import PooledName
    from pipeline.teachers.base import Teacher

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


# Makes a system; what must be closed after its turn goes onto the stack.
Make = Callable[[ExitStack], System]


class Systems:
    """Builds the systems one after another, and loads the backbone once for all that share it."""

    def __init__(
        self,
        *,
        encoder_dir: Path,
        open_teacher: "Callable[[], AbstractContextManager[Teacher]]",
        teacher_prompt: str = "",
        answers: "Answers",
        models: Mapping[SystemName, Callable[[], System]] | None = None,
        device: str,
        dtype: DType,
        batch_size: int,
        batch_tokens: int | None = None,
        seeds: Sequence[int] = (0,),
        processes: int = 1,
        trust_remote_code: bool = False,
        wrap: Callable[[System], AbstractContextManager[System]] = nullcontext,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            encoder_dir: the trained encoder.
            open_teacher: called when the turn of a system comes that needs it, and closed after it.
            teacher_prompt: what the teacher itself puts before a text.
            answers: the backbone's answers, for hyde; closed by `close`.
            models: loads further systems by name.
            device: of the backbone.
            dtype: of the backbone.
            batch_size: texts in one forward pass of backbone-mean and echo.
            batch_tokens: tokens in one forward pass of an encoder; None leaves it to the encoder.
            seeds: of untrained students; each seed is a system.
            processes: each with the whole backbone and a GPU; more than one share the texts of a call.
            trust_remote_code: let the backbone run code that comes with it.
            wrap: put around each system that is built, and closed after its turn.
        """
        self._encoder_dir, self._device, self._dtype = encoder_dir, device, dtype
        self._open_teacher, self._teacher_prompt = open_teacher, teacher_prompt
        self._answers, self._models = answers, models or {}
        self._batch_size, self._batch_tokens, self._seeds = batch_size, batch_tokens, seeds
        self._processes, self._trust_remote_code, self._wrap = processes, trust_remote_code, wrap
        self._encoder: Encoder | None = None

    @property
    def answers(self) -> "Answers":
        """The backbone's own answers."""
        return self._answers

    def encoder(self) -> "Encoder":
        """The trained encoder, loaded at the first call.

        Raises:
            TrainingError: there is none.
            BackboneError: its backbone cannot be loaded.
        """
        if self._encoder is None:
            from pipeline.encoder.inference import Encoder

            self._encoder = Encoder.load(
                self._encoder_dir,
                device=self._device,
                dtype=self._dtype,
                trust_remote_code=self._trust_remote_code,
            )
        return self._encoder

    def build(self, names: Sequence[SystemName]) -> Iterator[System]:
        """The systems in the order of `names`; none is kept here.

        `untrained` stands for one system a seed: `untrained` of the first, `untrained-<seed>` of each other.
        """
        for name in names:
            for make in self._makers(name):
                yield from self._turn(make)

    def close(self) -> None:
        """Stop the engine behind the answers, if one runs."""
        self._answers.close()

    def _turn(self, make: Make) -> Iterator[System]:
        with ExitStack() as held:
            yield held.enter_context(self._wrap(make(held)))

    def _makers(self, name: SystemName) -> Iterator[Make]:
        match name:
            case "student":
                yield partial(self._instructed, name, None)
            case "teacher":
                yield self._teacher
            case "untrained":
                for seed in self._seeds:
                    yield partial(self._instructed, name if seed == self._seeds[0] else f"{name}-{seed}", seed)
            case "backbone-mean" | "echo":
                yield partial(self._pooled, name)
            case "hyde":
                yield self._hyde
            case _:
                yield lambda _: self._models[name]()

    def _instructed(self, name: SystemName, untrained_seed: int | None, held: ExitStack) -> System:
        encoder = self._encoder_of(untrained_seed, held)
        return InstructedSystem(name, fingerprint(encoder.identity, encoder.config), encoder, self._batch_tokens)

    def _encoder_of(self, untrained_seed: int | None, held: ExitStack) -> "Encoder | ParallelEncoder":
        if self._processes == 1:
            return self.encoder() if untrained_seed is None else self.encoder().untrained(untrained_seed)
        from pipeline.encoder.parallel import ParallelEncoder

        load = self._encoder_loader(untrained_seed)
        return held.enter_context(closing(ParallelEncoder(load, places(self._processes))))

    def _encoder_loader(self, untrained_seed: int | None = None) -> "Callable[[], Encoder]":
        from pipeline.encoder.parallel import encoder_loader

        self._encoder = None  # the first of the processes needs its memory
        return encoder_loader(
            self._encoder_dir,
            dtype=self._dtype,
            untrained_seed=untrained_seed,
            trust_remote_code=self._trust_remote_code,
        )

    def _pooled(self, name: "PooledName", held: ExitStack) -> System:
        from pipeline.evaluation.baselines import pooled, pooled_in_processes

        if self._processes == 1:
            return pooled(name, self.encoder(), self._batch_size)
        where = places(self._processes)
        return held.enter_context(pooled_in_processes(name, self._encoder_loader(), self._batch_size, where))

    def _teacher(self, held: ExitStack) -> System:
        teacher = held.enter_context(self._open_teacher())
        return BareSystem("teacher", teacher.identity, teacher, self._teacher_reads)

    def _hyde(self, held: ExitStack) -> System:
        from pipeline.evaluation.baselines import HydeSystem

        if not self._answers.keeps_engine:
            self._encoder = None  # the engine needs its memory; a later system loads it again
        prompting = f"queries: the backbone's answer to instruction and text; documents: {BARE}"
        if self._teacher_prompt:
            prompting += f"; both with {self._teacher_reads}"
        return HydeSystem(self._answers, held.enter_context(self._open_teacher()), prompting)

    @property
    def _teacher_reads(self) -> str:
        return f"own prompt {self._teacher_prompt!r}" if self._teacher_prompt else BARE
