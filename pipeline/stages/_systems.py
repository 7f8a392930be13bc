"""The sections of params.yaml that say which systems are compared, shared by the stages evaluate and probe."""

from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from pipeline.artifacts import Artifact, open_artifact
from pipeline.backbone import BackboneParams, best_device
from pipeline.evaluation.systems import EvaluateParams, Systems
from pipeline.params import Params
from pipeline.teachers import TeacherParams, build_teacher

ENCODER = Path("models/encoder")


class TeacherSection(Params):
    """The section `embed`, of which only the teacher counts here."""

    model_config = ConfigDict(extra="ignore")

    teacher: TeacherParams


class SystemInputs(Params):
    """The sections behind the systems."""

    backbone: BackboneParams
    embed: TeacherSection
    evaluate: EvaluateParams


def make_systems(inputs: SystemInputs) -> Systems:
    """The systems of the params, on the best device."""
    teacher = inputs.embed.teacher
    return Systems(
        encoder_dir=ENCODER,
        load_teacher=lambda: build_teacher(teacher, inputs.backbone),
        teacher_prompt=teacher.prompt,
        device=best_device(),
        dtype=inputs.evaluate.dtype,
        batch_size=inputs.evaluate.batch_size,
        seed=inputs.evaluate.seed,
    )


def encoder_artifact() -> Artifact:
    """The trained encoder, verified.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return open_artifact(ENCODER, "encoder")


def manifest_params(inputs: SystemInputs, **own: Any) -> dict[str, Any]:
    """What decided the result, for its manifest."""
    return {"evaluate": inputs.evaluate.model_dump(), "teacher": inputs.embed.teacher.model_dump(), **own}
