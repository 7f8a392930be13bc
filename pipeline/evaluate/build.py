"""Builds the compared systems from the sections of params.yaml: the student, its teacher, and the baselines.

Each has its own prompting, which every result records: a student reads the generative instruction before the text; the
teacher and mean pooling of the backbone read the bare text, as when the targets were made (a teacher with a prompt of
its own adds it); HyDE answers instruction and text; published models have prompts of their own.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backbone.device import best_device, release_memory
from pipeline.backbone.loading import BackboneParams, DType
from pipeline.core.artifacts import Artifact, open_artifact, read_manifest
from pipeline.core.config import Params
from pipeline.core.errors import EvaluationError, nested_in, section
from pipeline.core.paths import ENCODER_DIR, QUERIES_DIR
from pipeline.core.run import work_dir
from pipeline.core.target_transform import STANDARDIZE, TargetTransform
from pipeline.embed.params import TeacherSection
from pipeline.embed.teachers.base import Teacher
from pipeline.embed.teachers.pool import open_teacher
from pipeline.embed.teachers.transformed import in_trained_space
from pipeline.encoder.folder.config import fingerprint
from pipeline.encoder.pool import Variant, trained
from pipeline.evaluate.baselines import HydeSystem, ModelSystem, pooled, pooled_in_processes
from pipeline.evaluate.embedding_cache import CachedSystem
from pipeline.evaluate.params import EvaluateParams, ModelParams
from pipeline.evaluate.registry import BUILT_IN, SystemEntry, entry_of
from pipeline.evaluate.standardized import StandardizedSystem, training_texts
from pipeline.evaluate.system import BARE, BareSystem, InstructedSystem, System, SystemName, innermost
from pipeline.generate.answer_cache import Answers
from pipeline.generate.engines.registry import ENGINES
from pipeline.generate.params import GenerateParams
from pipeline.parallel.devices import Places, places_for

if TYPE_CHECKING:
    from pipeline.encoder.head import Reading
    from pipeline.encoder.inference import Encoder
    from pipeline.encoder.pool import ParallelEncoder

log = logging.getLogger(__name__)

# What to lower where the memory of a device is full.
MEMORY_PARAMS = ("evaluate.batch_tokens", "embed.teacher.batch_tokens")

# Builds a system; what must be closed after its turn goes onto the stack.
Builder = Callable[[ExitStack], System]


class TeacherInputs(Params):
    """The sections behind the teacher alone."""

    backbone: BackboneParams
    embed: TeacherSection


class SystemInputs(TeacherInputs):
    """The sections behind the systems."""

    generate: GenerateParams
    evaluate: EvaluateParams


@dataclass
class Systems:
    """Builds systems one after another, with one model in memory at a time.

    The backbone stays loaded between systems that share it, and makes room for all others.

    Attributes:
        encoder_dir: the trained encoder.
        open_teacher: opens the teacher for the turn of a system that uses it.
        answers: the backbone's own answers, for hyde; closed by `close`.
        device: of the backbone.
        dtype: of the backbone.
        batch_tokens: tokens in one forward pass of an encoder, backbone-mean and echo; None: by the device.
        teacher_prompt: what the teacher itself puts before a text.
        models: loads further systems by name.
        seeds: of untrained students; each seed is a system.
        places: of processes that each have the whole backbone and share the texts of a call; None: this process.
        trust_remote_code: let the backbone run code that comes with it.
        wrap: put around each system that is built, and closed after its turn.
        training_texts: gives the texts that standardised systems are fitted on.
        standardizations: what they have been fitted to so far, by system.
    """

    encoder_dir: Path
    open_teacher: Callable[[], AbstractContextManager[Teacher]]
    answers: Answers
    device: str
    dtype: DType
    batch_tokens: int | None = None
    teacher_prompt: str = ""
    models: Mapping[SystemName, Callable[[], System]] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    places: Places | None = None
    trust_remote_code: bool = False
    wrap: Callable[[System], AbstractContextManager[System]] = nullcontext
    training_texts: Callable[[], Sequence[str]] = tuple
    standardizations: dict[SystemName, TargetTransform] = field(default_factory=dict, init=False)
    _encoder: "Encoder | None" = field(default=None, init=False)

    def encoder(self) -> "Encoder":
        """The trained encoder, loaded at the first call.

        Raises:
            TrainingError: there is none.
            BackboneError: its backbone cannot be loaded.
        """
        from pipeline.encoder.folder.read import read_encoder

        if self._encoder is None:
            with section("evaluate"):
                self._encoder = read_encoder(
                    self.encoder_dir, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
                )
        return self._encoder

    def build(self, names: Sequence[SystemName]) -> Iterator[System]:
        """The systems in the order of `names`; each is closed, and no longer referenced here, before the next.

        A loop must `del` its variable at the end of its body: else that keeps a model while the next one is loaded.
        `untrained` stands for one system a seed: `untrained` of the first, `untrained-<seed>` of each other.
        """
        for name in names:
            for build in self._builders(name, names):
                release_memory()
                with ExitStack() as stack:
                    # Wrapped first: a reading and its standardised form share the embeddings of a cache.
                    yield self._standardized(stack.enter_context(self.wrap(build(stack))))

    def _standardized(self, system: System) -> System:
        """The system in its standardised or decorrelated form, if its entry says so."""
        entry = entry_of(system.name)
        if entry is None or entry.transform is None:
            return system
        known = self._fitted_by_training(system) if entry.transform == STANDARDIZE else None
        fitted = (
            StandardizedSystem.of_reading(system.name, system, known)
            if known
            else StandardizedSystem.fitted(system.name, system, self.training_texts(), entry.transform)
        )
        self.standardizations[system.name] = fitted.transform
        return fitted

    def _fitted_by_training(self, system: System) -> "Reading | None":
        """The reading of an untrained student with which training began, so that no text is read for it again."""
        from pipeline.encoder.inference import Encoder

        encoder = getattr(innermost(system), "encoder", None)
        reading = encoder.start_reading() if isinstance(encoder, Encoder) else None
        if reading is None:
            return None
        params = read_manifest(self.encoder_dir).manifest.params
        precision = params.get("backbone", {}).get("dtype"), params.get("train", {}).get("quantize")
        return reading if precision == (self.dtype, None) else None

    def close(self) -> None:
        """Stop the engine behind the answers, if one runs."""
        self.answers.close()

    def _builders(self, name: SystemName, names: Sequence[SystemName]) -> Iterator[Builder]:
        if name not in BUILT_IN:
            yield partial(self._model, name)
            return
        match BUILT_IN[name].kind:
            case "encoder" if BUILT_IN[name].per_seed:
                for seed in self.seeds:
                    called = name if seed == self.seeds[0] else f"{name}-{seed}"
                    yield partial(self._instructed, called, _untrained(BUILT_IN[name], seed))
            case "encoder":
                yield partial(self._instructed, name, trained)
            case "start":
                yield partial(self._start, name, names)
            case "teacher":
                yield self._teacher
            case "pooling":
                yield partial(self._pooled, name)
            case "hyde":
                yield self._hyde

    def _start(self, name: SystemName, names: Sequence[SystemName], stack: ExitStack) -> System:
        """The start; untrained students among `names` with its new tokens get their embeddings from its pass."""
        from pipeline.encoder.inference import Encoder

        start = self._instructed(name, methodcaller("at_start"), stack)
        if not isinstance(start.encoder, Encoder):
            return start
        untrained = [each for each in names if each in BUILT_IN and BUILT_IN[each].per_seed]
        # Standardised and decorrelated students share their embeddings: their cache is opened once.
        others = {(BUILT_IN[each].transform is None, seed): each for each in untrained for seed in self.seeds}
        beside = []
        for (_, seed), other in others.items():
            system = self._instructed(other, _untrained(BUILT_IN[other], seed), stack)
            if isinstance(system.encoder, Encoder) and start.encoder.reads_as(system.encoder):
                cached = stack.enter_context(self.wrap(system))
                if isinstance(cached, CachedSystem):
                    beside.append((system.encoder, cached))
        return replace(start, beside=beside)

    def _instructed(self, name: SystemName, variant: Variant, stack: ExitStack) -> InstructedSystem:
        encoder = self._encoder_of(variant, stack)
        return InstructedSystem(name, fingerprint(encoder.identity, encoder.config), encoder, self.batch_tokens)

    def _encoder_of(self, variant: Variant, stack: ExitStack) -> "Encoder | ParallelEncoder":
        if self.places is None:
            found: Encoder = variant(self.encoder())
            return found
        from pipeline.encoder.pool import ParallelEncoder

        load = self._encoder_loader(variant)
        return stack.enter_context(closing(ParallelEncoder(load, self.places)))

    def _encoder_loader(self, variant: Variant = trained) -> "Callable[[], Encoder]":
        from pipeline.encoder.pool import encoder_loader

        self._drop_encoder()  # the first of the processes needs its memory
        return encoder_loader(
            self.encoder_dir,
            dtype=self.dtype,
            variant=variant,
            trust_remote_code=self.trust_remote_code,
        )

    def _pooled(self, name: SystemName, stack: ExitStack) -> System:
        if self.places is None:
            return pooled(name, self.encoder(), self.batch_tokens)
        return stack.enter_context(pooled_in_processes(name, self._encoder_loader(), self.batch_tokens, self.places))

    def _model(self, name: SystemName, _: ExitStack) -> System:
        self._drop_encoder()
        return self.models[name]()

    def _drop_encoder(self) -> None:
        self._encoder = None  # a later system loads it again
        release_memory()

    def _teacher(self, stack: ExitStack) -> System:
        self._drop_encoder()
        teacher = stack.enter_context(self.open_teacher())
        return BareSystem("teacher", teacher.identity, teacher, self._teacher_prompting)

    def _hyde(self, stack: ExitStack) -> System:
        self._drop_encoder()
        prompting = f"queries: the backbone's answer to instruction and text; documents: {BARE}"
        if self.teacher_prompt:
            prompting += f"; both with {self._teacher_prompting}"
        return HydeSystem(self.answers, stack.enter_context(self.open_teacher()), prompting)

    @property
    def _teacher_prompting(self) -> str:
        return f"own prompt {self.teacher_prompt!r}" if self.teacher_prompt else BARE


def _untrained(entry: SystemEntry, seed: int) -> Variant:
    return methodcaller("untrained_reading" if entry.transform else "untrained", seed)


def make_systems(inputs: SystemInputs) -> Systems:
    """The systems of the params, on the best device; `contextlib.closing` releases them.

    Raises:
        EvaluationError: `data_parallel` exceeds the visible GPUs.
    """
    params = inputs.evaluate
    with section("evaluate"), nested_in(names={"processes": "data_parallel"}):
        places = places_for(params.data_parallel, error=EvaluationError)
    return Systems(
        encoder_dir=ENCODER_DIR,
        open_teacher=partial(_open_teacher, inputs),
        answers=make_answers(inputs),
        device=best_device(),
        dtype=params.dtype,
        batch_tokens=params.batch_tokens,
        teacher_prompt=inputs.embed.teacher.prompt,
        models={name: partial(_load_model, name, model) for name, model in params.models.items()},
        seeds=params.seeds,
        places=places,
        trust_remote_code=inputs.backbone.trust_remote_code,
        wrap=partial(_with_cache, params),
        training_texts=cache(lambda: training_texts(queries_artifact())),
    )


@contextmanager
def _open_teacher(inputs: SystemInputs) -> Iterator[Teacher]:
    """The teacher in the space that the student was trained in."""
    with ExitStack() as stack:
        with section("embed"), nested_in("teacher"):
            opened = open_teacher(inputs.embed.teacher, inputs.backbone, inputs.evaluate.data_parallel)
            teacher = in_trained_space(stack.enter_context(opened), ENCODER_DIR)
        yield teacher


def _load_model(name: SystemName, model: ModelParams) -> System:
    with section("evaluate"), nested_in(f"models.{name}"):
        return ModelSystem(name, **model.model_dump())


def _with_cache(params: EvaluateParams, system: System) -> AbstractContextManager[System]:
    root = work_dir("embeddings") if params.cache_embeddings else None
    return closing(CachedSystem(system, root, embeddings_dtype=params.embeddings_dtype, dtype=params.dtype))


def make_answers(inputs: SystemInputs) -> Answers:
    """The backbone's own answers, by section `generate` with the overrides of `evaluate.answers`."""
    overrides, generate = inputs.evaluate.answers, inputs.generate
    if overrides.max_new_tokens is not None:
        generate = generate.model_copy(update={"max_new_tokens": overrides.max_new_tokens})
    keep = overrides.keep_engine
    if keep is None:
        keep = best_device() == "cpu" or ENGINES[generate.engine].runs_on == "endpoint"
        if not keep:
            log.info("answers: the engine stops after each call to free the GPU (evaluate.answers.keep_engine)")
    elif keep and best_device() == "cuda":
        generate = _with_memory(generate, overrides.engine_memory)
    return Answers.of(inputs.backbone, generate, work_dir("answers"), keeps_engine=keep)


def _with_memory(generate: GenerateParams, share: float) -> GenerateParams:
    """The engine with this share of each GPU's memory, unless its options set one or it has no such option."""
    option = "gpu_memory_utilization"
    if option in generate.options or option not in ENGINES[generate.engine].engine().SPEED_OPTIONS:
        return generate
    log.info("answers: the engine stays and takes %.2f of a GPU's memory (evaluate.answers.engine_memory)", share)
    return generate.model_copy(update={"options": {**generate.options, option: share}})


def own_instructions(inputs: SystemInputs) -> Path | None:
    """The user's instructions file, if there is one."""
    return Path(inputs.evaluate.instructions) if inputs.evaluate.instructions else None


def encoder_artifact() -> Artifact:
    """The trained encoder, verified.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return open_artifact(ENCODER_DIR, "encoder")


def queries_artifact() -> Artifact:
    """The queries, verified; raises as `encoder_artifact`."""
    return open_artifact(QUERIES_DIR, "queries")


def manifest_params(inputs: SystemInputs, **own: Any) -> dict[str, Any]:
    """The params that decide the result, for its manifest."""
    evaluate = inputs.evaluate.model_dump(
        exclude={"cache_embeddings": True, "data_parallel": True, "answers": {"keep_engine", "engine_memory"}}
    )
    return {"evaluate": evaluate, "teacher": inputs.embed.teacher.model_dump(), **own}
