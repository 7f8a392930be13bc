"""The embedders that are compared: the trained student, its teacher, and what the training must beat.

Each is prompted by its own convention, which every result states as `prompting`: a student reads the generative
instruction before the text; the teacher and the backbone's mean pooling read the bare text (a teacher with a prompt of
its own adds that itself), as they did when they made the targets.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from pipeline.artifacts import digest_of
from pipeline.backbone import DType
from pipeline.params import Params

if TYPE_CHECKING:
    import numpy as np

    from pipeline.encoder.inference import Encoder
    from pipeline.teachers.base import Teacher

SystemName = Literal["student", "teacher", "untrained", "backbone-mean"]

VERSION = 1  # raise it when the same weights embed differently: finished scores are then not taken over

GENERATIVE = "generative instruction"
BARE = "bare text"


class EvaluateParams(Params):
    """What is compared, and how texts are embedded for it."""

    systems: list[SystemName] = Field(min_length=1, description="student is compared with teacher where both are named")
    local_dir: str = Field(description="folder of the local task folders")
    batch_size: int = Field(default=32, gt=0)
    dtype: DType = "bfloat16"
    seed: int = Field(default=0, ge=0, description="of the untrained student's random start")


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

    def encode(self, texts: Sequence[str], instruction: str) -> "np.ndarray[Any, Any]":
        """Embeddings float32 [len(texts), d], compared by cosine."""
        ...


def revision_of(system: System, **conditions: Any) -> str:
    """40 hex digits that change with a system's weights, its prompting or the `conditions` of a score."""
    return digest_of({"version": VERSION, "identity": system.identity, "prompting": system.prompting, **conditions})[
        :40
    ]


@dataclass(frozen=True)
class InstructedSystem:
    """An encoder that reads the instruction before the text."""

    name: str
    identity: dict[str, Any]
    encoder: "Encoder"
    batch_size: int
    prompting: str = GENERATIVE

    def encode(self, texts: Sequence[str], instruction: str) -> "np.ndarray[Any, Any]":
        """Embeddings float32 [len(texts), d] of instruction + text."""
        return self.encoder.encode(texts, instruction=instruction, batch_size=self.batch_size)


@dataclass(frozen=True)
class BareSystem:
    """A teacher, which reads the text without the instruction."""

    name: str
    identity: dict[str, Any]
    teacher: "Teacher"
    prompting: str = BARE

    def encode(self, texts: Sequence[str], instruction: str) -> "np.ndarray[Any, Any]":
        """Embeddings float32 [len(texts), d] of the text; `instruction` is not used."""
        return self.teacher.embed(texts)


class Systems:
    """Builds the systems one after another, and loads the backbone once for all that share it."""

    def __init__(
        self,
        *,
        encoder_dir: Path,
        load_teacher: "Callable[[], Teacher]",
        teacher_prompt: str = "",
        device: str,
        dtype: DType,
        batch_size: int,
        seed: int,
    ) -> None:
        """`load_teacher` is called when the teacher's turn comes; it is freed with the system that holds it."""
        self._encoder_dir, self._device, self._dtype = encoder_dir, device, dtype
        self._load_teacher, self._teacher_prompt = load_teacher, teacher_prompt
        self._batch_size, self._seed = batch_size, seed
        self._encoder: Encoder | None = None

    def encoder(self) -> "Encoder":
        """The trained encoder, loaded at the first call.

        Raises:
            TrainingError: there is none.
            BackboneError: its backbone cannot be loaded.
        """
        if self._encoder is None:
            from pipeline.encoder.inference import Encoder

            self._encoder = Encoder.load(self._encoder_dir, device=self._device, dtype=self._dtype)
        return self._encoder

    def build(self, names: Sequence[SystemName]) -> Iterator[System]:
        """The systems in the order of `names`; none is kept here."""
        makers: dict[SystemName, Callable[[], System]] = {
            "student": self._student,
            "teacher": self._teacher,
            "untrained": self._untrained,
            "backbone-mean": self._backbone_mean,
        }
        for name in names:
            yield makers[name]()

    def _student(self) -> System:
        encoder = self.encoder()
        return InstructedSystem("student", _identity(encoder), encoder, self._batch_size)

    def _untrained(self) -> System:
        encoder = self.encoder().untrained(self._seed)
        return InstructedSystem("untrained", _identity(encoder), encoder, self._batch_size)

    def _teacher(self) -> System:
        teacher = self._load_teacher()
        prompting = f"own prompt {self._teacher_prompt!r}" if self._teacher_prompt else BARE
        return BareSystem("teacher", teacher.identity, teacher, prompting)

    def _backbone_mean(self) -> System:
        from pipeline.teachers.backbone_teacher import VERSION, BackboneTeacher

        encoder = self.encoder()
        identity = {
            "pooling": "mean",
            "version": VERSION,
            "max_tokens": encoder.max_tokens,
            "backbone": encoder.config.backbone,
        }
        teacher = BackboneTeacher(
            encoder.model,
            encoder.tokenizer,
            max_tokens=encoder.max_tokens,
            batch_size=self._batch_size,
            identity=identity,
        )
        return BareSystem("backbone-mean", identity, teacher)


def _identity(encoder: "Encoder") -> dict[str, Any]:
    """The weights and how texts become prompts: both decide an embedding."""
    return {**encoder.identity, "config": encoder.config.model_dump(exclude={"teacher"})}
