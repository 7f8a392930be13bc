"""Loads the teacher of the params. Each kind of `registry.TEACHERS` has its loader here."""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import nested_in, section
from pipeline.embed.teachers.registry import TEACHERS, TRAINED

if TYPE_CHECKING:
    from pipeline.embed.params import TeacherParams
    from pipeline.embed.teachers.base import Teacher

# Called with the keys of `embed.teacher` that the kind reads; where it is built on the backbone, also with `backbone`.
LOADERS = {
    "llm2vec": "pipeline.embed.teachers.llm2vec:load_llm2vec",
    TRAINED: "pipeline.embed.teachers.trained:load_trained",
    "backbone": "pipeline.embed.teachers.backbone:load_backbone_teacher",
    "sentence-transformers": "pipeline.embed.teachers.sentence_transformers:SentenceTransformersTeacher",
    "hash": "pipeline.embed.teachers.stub:HashTeacher.from_options",
}


def load_teacher(params: "TeacherParams", backbone: BackboneParams) -> "Teacher":
    """Load the teacher; raises TeacherError or, if the backbone cannot be loaded, BackboneError."""
    kind = TEACHERS[params.kind]
    arguments: dict[str, Any] = {key: getattr(params, key) for key in kind.reads}
    if kind.on_backbone:
        arguments["backbone"] = backbone
    with section("embed"), nested_in("teacher"):
        teacher: Teacher = resolve_name(LOADERS[params.kind])(**arguments)
    return teacher
