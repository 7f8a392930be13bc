"""The teachers by kind. Adding one = one file beside this one, one entry here, one name in `TeacherParams.kind`."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline.backbone.loading import BackboneParams, DType, identify
from pipeline.core.artifacts import open_artifact
from pipeline.core.config import Params
from pipeline.core.errors import TeacherError
from pipeline.core.paths import TEACHER_DIR
from pipeline.embed.teachers.template import SLOT, TEMPLATES, Pooling, template_of

if TYPE_CHECKING:
    from pipeline.embed.teachers.base import Teacher

Kind = Literal["llm2vec", "llm2vec-trained", "backbone", "sentence-transformers", "hash"]

# The keys that only some kinds read; elsewhere they must keep their defaults.
_READ_BY: dict[str, tuple[Kind, ...]] = {
    "name": ("llm2vec", "sentence-transformers"),
    "revision": ("llm2vec", "sentence-transformers"),
    "adapters": ("llm2vec",),
    "template": ("llm2vec", "llm2vec-trained", "backbone"),
    "pooling": ("llm2vec", "llm2vec-trained", "backbone"),
    "prompt": ("sentence-transformers",),
    "trust_remote_code": ("llm2vec", "sentence-transformers"),
    "options": ("hash",),
}


class AdapterParams(Params):
    """A LoRA adapter in safetensors."""

    name: str = Field(description="hub name or local folder")
    revision: str | None = Field(default=None, description="commit on the hub; pin it")


class TeacherParams(Params):
    """The embedding model whose vectors the student learns (`embed.teacher`)."""

    kind: Kind
    name: str | None = Field(default=None, description="hub name or local folder; of llm2vec null = the backbone")
    revision: str | None = Field(default=None, description="commit on the hub; pin it")
    adapters: list[AdapterParams] = Field(default_factory=list, description="of llm2vec, merged in order: MNTP, SimCSE")
    max_tokens: int = Field(default=512, ge=1, description="longer texts lose their end")
    dtype: DType = Field(default="float32", description="of the teacher's weights")
    batch_size: int = Field(default=32, ge=1)
    template: Annotated[str, BeforeValidator(template_of)] = Field(
        default=SLOT, description="of llm2vec and backbone: pooled from its last {text} on; or text, echo, one-word"
    )
    pooling: Pooling = Field(default="mean", description="of llm2vec and backbone; mean-all: special tokens as well")
    prompt: str = Field(default="", description="put before each text; only of kind sentence-transformers")
    trust_remote_code: bool = False
    options: dict[str, Any] = Field(default_factory=dict, description="of kind `hash`: width, delay")

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        fields = type(self).model_fields
        for key, kinds in _READ_BY.items():
            if self.kind not in kinds and getattr(self, key) != fields[key].get_default(call_default_factory=True):
                raise ValueError(f"kind {self.kind} takes no {key}")
        if self.kind == "sentence-transformers" and self.name is None:
            raise ValueError("kind sentence-transformers needs a name")
        if self.name is None and self.revision is not None:
            raise ValueError("a revision needs a name")
        if self.kind == "llm2vec" and not self.adapters:
            raise ValueError("kind llm2vec needs adapters: the one of MNTP, then the one of SimCSE")
        if SLOT not in self.template:
            raise ValueError(f"template {self.template!r} holds no {SLOT} and is none of {', '.join(TEMPLATES)}")
        if self.template == TEMPLATES["one-word"] and self.pooling != "last":
            raise ValueError("template one-word needs pooling last: no earlier token has read the question")
        return self


def build_teacher(params: TeacherParams, backbone: BackboneParams) -> "Teacher":
    """Load the teacher of the params; kind `backbone` is the backbone itself.

    Raises:
        TeacherError: it cannot be loaded with these params.
        BackboneError: the backbone cannot be loaded.
    """
    match params.kind:
        case "llm2vec":
            return _llm2vec(params, backbone)
        case "llm2vec-trained":
            return _llm2vec(_trained(params, backbone), backbone)
        case "backbone":
            return _backbone(params, backbone)
        case "sentence-transformers":
            return _sentence_transformers(params)
        case "hash":
            return _hash(params)


def _llm2vec(params: TeacherParams, backbone: BackboneParams) -> "Teacher":
    from pipeline.embed.teachers.llm2vec import Llm2VecTeacher

    named = {"name": params.name, "revision": params.revision, "trust_remote_code": params.trust_remote_code}
    return Llm2VecTeacher.load(
        backbone.model_copy(update={"dtype": params.dtype} | (named if params.name else {})),
        [(adapter.name, adapter.revision) for adapter in params.adapters],
        max_tokens=params.max_tokens,
        batch_size=params.batch_size,
        template=params.template,
        pooling=params.pooling,
    )


def _trained(params: TeacherParams, backbone: BackboneParams) -> TeacherParams:
    """The same params with the adapters that the stage teach trained.

    Raises:
        ArtifactError: they are missing or damaged.
        TeacherError: none were asked for, or they were trained on another backbone or another reading of the text.
    """
    found = open_artifact(TEACHER_DIR, "teacher").manifest
    if not found.params.get("asked"):
        raise TeacherError(f"embed.teacher.kind: {params.kind}, but {TEACHER_DIR} holds no teacher: run teach again")
    wanted: dict[str, Any] = {
        "backbone": identify(backbone.name, backbone.revision),
        "template": params.template,
        "pooling": params.pooling,
    }
    for key, value in wanted.items():
        made = found.models.get(key) if key == "backbone" else found.params.get(key)
        if made != value:
            raise TeacherError(f"{TEACHER_DIR} was trained with {key} {made}, params say {value}: run teach again")
    adapters = [AdapterParams(name=str(TEACHER_DIR / phase)) for phase in ("mntp", "simcse")]
    return params.model_copy(update={"adapters": adapters})


def _backbone(params: TeacherParams, backbone: BackboneParams) -> "Teacher":
    from pipeline.embed.teachers.backbone import BackboneTeacher

    return BackboneTeacher.load(
        backbone.model_copy(update={"dtype": params.dtype}),
        max_tokens=params.max_tokens,
        batch_size=params.batch_size,
        template=params.template,
        pooling=params.pooling,
    )


def _sentence_transformers(params: TeacherParams) -> "Teacher":
    from pipeline.embed.teachers.sentence_transformers import SentenceTransformersTeacher

    return SentenceTransformersTeacher(
        str(params.name),
        revision=params.revision,
        max_tokens=params.max_tokens,
        dtype=params.dtype,
        batch_size=params.batch_size,
        prompt=params.prompt,
        trust_remote_code=params.trust_remote_code,
    )


def _hash(params: TeacherParams) -> "Teacher":
    from pipeline.embed.teachers.stub import HashTeacher

    try:
        return HashTeacher(**params.options)
    except (TypeError, ValueError) as error:
        raise TeacherError(f"embed.teacher.options {params.options}: {error}") from None
