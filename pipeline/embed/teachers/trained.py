"""The LLM2Vec teacher that the stage teach trained."""

from typing import Any

from pipeline.backbone.loading import BackboneParams, identify
from pipeline.core.artifacts import open_artifact
from pipeline.core.errors import TeacherError
from pipeline.core.paths import TEACHER_DIR
from pipeline.embed.teachers.adapters import AdapterParams
from pipeline.embed.teachers.llm2vec import load_llm2vec
from pipeline.embed.teachers.pooling import PooledTeacher
from pipeline.embed.teachers.template import Pooling


def load_trained(backbone: BackboneParams, *, template: str, pooling: Pooling, **settings: Any) -> PooledTeacher:
    """As `load_llm2vec`, with the adapters of `TEACHER_DIR`.

    Raises:
        ArtifactError: they are missing or damaged.
        TeacherError: the folder holds no teacher, or one of another backbone, template or pooling.
    """
    manifest = open_artifact(TEACHER_DIR, "teacher").manifest
    if not manifest.params.get("asked"):
        raise TeacherError(f"{TEACHER_DIR} holds no teacher: run teach again", argument="kind")
    found = {"backbone": manifest.models.get("backbone")} | manifest.params
    wanted = {"backbone": identify(backbone.name, backbone.revision), "template": template, "pooling": pooling}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise TeacherError(
                f"{TEACHER_DIR} was trained with {key} {found.get(key)}, params say {value}: run teach again"
            )
    adapters = [AdapterParams(name=str(TEACHER_DIR / phase)) for phase in ("mntp", "simcse")]
    return load_llm2vec(backbone, adapters, template=template, pooling=pooling, **settings)
