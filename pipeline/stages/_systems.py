"""The sections of params.yaml that say which systems are compared, shared by the stages evaluate and probe."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from pipeline.artifacts import Artifact, open_artifact
from pipeline.backbone import BackboneParams, best_device
from pipeline.engines import EngineName
from pipeline.errors import EvaluationError
from pipeline.evaluation.answers import Answers
from pipeline.evaluation.baselines import ModelSystem
from pipeline.evaluation.embedding_cache import CachedSystem
from pipeline.evaluation.params import AnswersParams, EvaluateParams, ModelParams
from pipeline.evaluation.systems import System, Systems
from pipeline.generation import GenerateParams
from pipeline.params import Params
from pipeline.places import worker_count
from pipeline.runtime import work_dir
from pipeline.teachers import TeacherParams
from pipeline.teachers.base import Teacher
from pipeline.teachers.parallel import open_teacher
from pipeline.teachers.transformed import in_trained_space

log = logging.getLogger(__name__)

ENCODER = Path("models/encoder")
DATA_PARALLEL = "evaluate.data_parallel"


class TeacherSection(Params):
    """The section `embed`, of which only the teacher counts here."""

    model_config = ConfigDict(extra="ignore")

    teacher: TeacherParams


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
        encoder_dir=ENCODER,
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
    workers = inputs.evaluate.data_parallel
    with open_teacher(inputs.embed.teacher, inputs.backbone, workers, knob=DATA_PARALLEL) as teacher:
        yield in_trained_space(teacher, ENCODER)


def _with_cache(params: EvaluateParams, system: System) -> AbstractContextManager[System]:
    if not params.cache_embeddings:
        return nullcontext(system)
    return CachedSystem(system, work_dir("embeddings"), dtype=params.dtype)


def make_answers(inputs: SystemInputs) -> Answers:
    """The backbone's own answers, by section `generate` with the changes of `evaluate.answers`."""
    changes = inputs.evaluate.answers
    generate = inputs.generate
    if changes.max_new_tokens is not None:
        generate = generate.model_copy(update={"max_new_tokens": changes.max_new_tokens})
    keep = _keeps_engine(changes, generate.engine, best_device())
    return Answers.of(inputs.backbone, generate, work_dir("answers"), keeps_engine=keep)


def _keeps_engine(params: AnswersParams, engine: EngineName, device: str) -> bool:
    if params.keep_engine is not None:
        return params.keep_engine
    if device != "cpu" and engine != "openai":
        log.info("answers: the engine stops after each round, so that the GPU is free (evaluate.answers.keep_engine)")
        return False
    return True


def _loader(key: str, model: ModelParams) -> Callable[[], System]:
    return partial(ModelSystem, key, **model.model_dump())


def own_instructions(inputs: SystemInputs) -> Path | None:
    """The user's instructions file, if there is one."""
    return Path(inputs.evaluate.instructions) if inputs.evaluate.instructions else None


def encoder_artifact() -> Artifact:
    """The trained encoder, verified.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return open_artifact(ENCODER, "encoder")


def manifest_params(inputs: SystemInputs, **own: Any) -> dict[str, Any]:
    """What decided the result, for its manifest."""
    evaluate = inputs.evaluate.model_dump(
        exclude={"cache_embeddings": True, "data_parallel": True, "answers": {"keep_engine"}}
    )
    return {"evaluate": evaluate, "teacher": inputs.embed.teacher.model_dump(), **own}
