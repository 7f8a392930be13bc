"""The teachers by kind. Adding one = one file beside this one, one entry here, one name in `TeacherParams.kind`."""

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.backbone import BackboneParams, DType
from pipeline.errors import TeacherError
from pipeline.params import Params
from pipeline.teachers.reading import SLOT, Pooling

if TYPE_CHECKING:
    from pipeline.teachers.base import Teacher

Kind = Literal["llm2vec", "backbone", "sentence-transformers", "hash"]

# The keys that only some kinds read; elsewhere they must keep their defaults.
_READ_BY: dict[str, tuple[Kind, ...]] = {
    "name": ("llm2vec", "sentence-transformers"),
    "revision": ("llm2vec", "sentence-transformers"),
    "adapters": ("llm2vec",),
    "template": ("llm2vec", "backbone"),
    "pooling": ("llm2vec", "backbone"),
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
    template: str = Field(default=SLOT, description="of llm2vec and backbone: pooled from its last {text} on")
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
            raise ValueError(f"template {self.template!r} holds no {SLOT}")
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
        case "backbone":
            return _backbone(params, backbone)
        case "sentence-transformers":
            return _sentence_transformers(params)
        case "hash":
            return _hash(params)


def _llm2vec(params: TeacherParams, backbone: BackboneParams) -> "Teacher":
    from pipeline.teachers.llm2vec_teacher import Llm2VecTeacher

    named = {"name": params.name, "revision": params.revision, "trust_remote_code": params.trust_remote_code}
    return Llm2VecTeacher.load(
        backbone.model_copy(update={"dtype": params.dtype} | (named if params.name else {})),
        [(adapter.name, adapter.revision) for adapter in params.adapters],
        max_tokens=params.max_tokens,
        batch_size=params.batch_size,
        template=params.template,
        pooling=params.pooling,
    )


def _backbone(params: TeacherParams, backbone: BackboneParams) -> "Teacher":
    from pipeline.teachers.backbone_teacher import BackboneTeacher

    return BackboneTeacher.load(
        backbone.model_copy(update={"dtype": params.dtype}),
        max_tokens=params.max_tokens,
        batch_size=params.batch_size,
        template=params.template,
        pooling=params.pooling,
    )


def _sentence_transformers(params: TeacherParams) -> "Teacher":
    from pipeline.teachers.sentence_transformers_teacher import SentenceTransformersTeacher

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
    from pipeline.teachers.hash_teacher import HashTeacher

    try:
        return HashTeacher(**params.options)
    except (TypeError, ValueError) as error:
        raise TeacherError(f"embed.teacher.options {params.options}: {error}") from None
