"""The embedders that are compared: the trained student, its teacher, and what the training must beat (`baselines`).

Each is prompted by its own convention, which every result states as `prompting`: a student reads the generative
instruction before the text; the teacher and the backbone's pooling read the bare text (a teacher with a prompt of its
own adds that itself), as they did when they made the targets; HyDE answers the instruction and text; published models
have prompts of their own.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams, DType
from pipeline.core.artifacts import Artifact, open_artifact
from pipeline.core.config import Params
from pipeline.core.errors import EvaluationError, nested_in, section
from pipeline.core.paths import ENCODER_DIR
from pipeline.core.run import work_dir
from pipeline.embed.params import TeacherSection
from pipeline.embed.teachers.base import Teacher
from pipeline.embed.teachers.pool import open_teacher
from pipeline.embed.teachers.transformed import in_trained_space
from pipeline.encoder.folder.config import fingerprint
from pipeline.evaluate.baselines import ModelSystem
from pipeline.evaluate.embedding_cache import CachedSystem
from pipeline.evaluate.params import AnswersParams, EvaluateParams, ModelParams
from pipeline.evaluate.system import BARE, BareSystem, InstructedSystem, System, SystemName
from pipeline.generate.answer_cache import Answers
from pipeline.generate.engines.registry import ENGINES
from pipeline.generate.params import GenerateParams
from pipeline.parallel.devices import places, worker_count

if TYPE_CHECKING:
    from pipeline.embed.teachers.base import Teacher
    from pipeline.encoder.inference import Encoder
    from pipeline.encoder.pool import ParallelEncoder
    from pipeline.evaluate.baselines import PooledName
    from pipeline.generate.answer_cache import Answers


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
        from pipeline.encoder.pool import ParallelEncoder

        load = self._encoder_loader(untrained_seed)
        return held.enter_context(closing(ParallelEncoder(load, places(self._processes))))

    def _encoder_loader(self, untrained_seed: int | None = None) -> "Callable[[], Encoder]":
        from pipeline.encoder.pool import encoder_loader

        self._encoder = None  # the first of the processes needs its memory
        return encoder_loader(
            self._encoder_dir,
            dtype=self._dtype,
            untrained_seed=untrained_seed,
            trust_remote_code=self._trust_remote_code,
        )

    def _pooled(self, name: "PooledName", held: ExitStack) -> System:
        from pipeline.evaluate.baselines import pooled, pooled_in_processes

        if self._processes == 1:
            return pooled(name, self.encoder(), self._batch_size)
        where = places(self._processes)
        return held.enter_context(pooled_in_processes(name, self._encoder_loader(), self._batch_size, where))

    def _teacher(self, held: ExitStack) -> System:
        teacher = held.enter_context(self._open_teacher())
        return BareSystem("teacher", teacher.identity, teacher, self._teacher_reads)

    def _hyde(self, held: ExitStack) -> System:
        from pipeline.evaluate.baselines import HydeSystem

        if not self._answers.keeps_engine:
            self._encoder = None  # the engine needs its memory; a later system loads it again
        prompting = f"queries: the backbone's answer to instruction and text; documents: {BARE}"
        if self._teacher_prompt:
            prompting += f"; both with {self._teacher_reads}"
        return HydeSystem(self._answers, held.enter_context(self._open_teacher()), prompting)

    @property
    def _teacher_reads(self) -> str:
        return f"own prompt {self._teacher_prompt!r}" if self._teacher_prompt else BARE


# The sections of params.yaml that say which systems are compared, shared by the stages evaluate and probe.

log = logging.getLogger(__name__)

DATA_PARALLEL = "evaluate.data_parallel"


class TeacherInputs(Params):
    """The sections behind the teacher alone."""

    backbone: BackboneParams
    embed: TeacherSection


class SystemInputs(Params):
    """The sections behind the systems."""

    backbone: BackboneParams
    generate: GenerateParams
    embed: TeacherSection
    evaluate: EvaluateParams


def make_systems(inputs: SystemInputs) -> Systems:
    """The systems of the params, on the best device; `contextlib.closing` frees what they hold."""
    teacher, params = inputs.embed.teacher, inputs.evaluate
    return Systems(
        encoder_dir=ENCODER_DIR,
        open_teacher=partial(_open_teacher, inputs),
        teacher_prompt=teacher.prompt,
        answers=make_answers(inputs),
        models={key: _loader(key, model) for key, model in params.models.items()},
        device=best_device(),
        dtype=params.dtype,
        batch_size=params.batch_size,
        batch_tokens=params.batch_tokens,
        seeds=params.seeds,
        processes=worker_count(params.data_parallel, gpus_each=1, knob=DATA_PARALLEL, error=EvaluationError),
        trust_remote_code=inputs.backbone.trust_remote_code,
        wrap=partial(_with_cache, params),
    )


@contextmanager
def _open_teacher(inputs: SystemInputs) -> Iterator[Teacher]:
    """The teacher in the space that the student was trained in."""
    with section("evaluate"):
        opened = open_teacher(inputs.embed.teacher, inputs.backbone, inputs.evaluate.data_parallel)
    with opened as teacher:
        yield in_trained_space(teacher, ENCODER_DIR)


def _with_cache(params: EvaluateParams, system: System) -> AbstractContextManager[System]:
    if not params.cache_embeddings:
        return nullcontext(system)
    return closing(CachedSystem(system, work_dir("embeddings"), dtype=params.dtype))


def make_answers(inputs: SystemInputs) -> Answers:
    """The backbone's own answers, by section `generate` with the changes of `evaluate.answers`."""
    changes = inputs.evaluate.answers
    generate = inputs.generate
    if changes.max_new_tokens is not None:
        generate = generate.model_copy(update={"max_new_tokens": changes.max_new_tokens})
    keep = _keeps_engine(changes, generate.engine, best_device())
    return Answers.of(inputs.backbone, generate, work_dir("answers"), keeps_engine=keep)


def _keeps_engine(params: AnswersParams, engine: str, device: str) -> bool:
    if params.keep_engine is not None:
        return params.keep_engine
    if device != "cpu" and ENGINES[engine].runs_on != "endpoint":
        log.info("answers: the engine stops after each round, so that the GPU is free (evaluate.answers.keep_engine)")
        return False
    return True


def _loader(key: str, model: ModelParams) -> Callable[[], System]:
    def load() -> System:
        with section("evaluate"), nested_in(f"models.{key}"):
            return ModelSystem(key, **model.model_dump())

    return load


def own_instructions(inputs: SystemInputs) -> Path | None:
    """The user's instructions file, if there is one."""
    return Path(inputs.evaluate.instructions) if inputs.evaluate.instructions else None


def encoder_artifact() -> Artifact:
    """The trained encoder, verified.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return open_artifact(ENCODER_DIR, "encoder")


def manifest_params(inputs: SystemInputs, **own: Any) -> dict[str, Any]:
    """What decided the result, for its manifest."""
    evaluate = inputs.evaluate.model_dump(
        exclude={"cache_embeddings": True, "data_parallel": True, "answers": {"keep_engine"}}
    )
    return {"evaluate": evaluate, "teacher": inputs.embed.teacher.model_dump(), **own}
