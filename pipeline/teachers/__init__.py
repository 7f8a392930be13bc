"""The teachers by kind. Adding one = one file beside this one, one entry here, one name in `TeacherParams.kind`."""

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.backbone import BackboneParams, DType
from pipeline.errors import TeacherError
from pipeline.params import Params

if TYPE_CHECKING:
    from pipeline.teachers.base import Teacher


class TeacherParams(Params):
    """The embedding model whose vectors the student learns (`embed.teacher`)."""

    kind: Literal["sentence-transformers", "backbone", "hash"]
    name: str | None = Field(default=None, description="hub name or local folder; null for `backbone` and `hash`")
    revision: str | None = Field(default=None, description="commit on the hub; pin it")
    max_tokens: int = Field(default=512, ge=1, description="longer texts lose their end")
    dtype: DType = Field(default="float32", description="of the teacher's weights")
    batch_size: int = Field(default=32, ge=1)
    prompt: str = Field(default="", description="put before each text; only of kind sentence-transformers")
    trust_remote_code: bool = False
    options: dict[str, Any] = Field(default_factory=dict, description="of kind `hash`: width, delay")

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        named = self.kind == "sentence-transformers"
        if named and self.name is None:
            raise ValueError("kind sentence-transformers needs a name")
        if not named and (self.name is not None or self.revision is not None or self.prompt):
            raise ValueError(f"kind {self.kind} takes no name, revision or prompt")
        if self.kind != "hash" and self.options:
            raise ValueError(f"kind {self.kind} takes no options")
        return self


def build_teacher(params: TeacherParams, backbone: BackboneParams) -> "Teacher":
    """Load the teacher of the params; kind `backbone` is the backbone itself.

    Raises:
        TeacherError: it cannot be loaded with these params.
        BackboneError: the backbone cannot be loaded.
    """
    from pipeline.teachers.backbone_teacher import BackboneTeacher
    from pipeline.teachers.hash_teacher import HashTeacher
    from pipeline.teachers.sentence_transformers_teacher import SentenceTransformersTeacher

    match params.kind:
        case "sentence-transformers":
            return SentenceTransformersTeacher(
                str(params.name),
                revision=params.revision,
                max_tokens=params.max_tokens,
                dtype=params.dtype,
                batch_size=params.batch_size,
                prompt=params.prompt,
                trust_remote_code=params.trust_remote_code,
            )
        case "backbone":
            return BackboneTeacher.load(
                backbone.model_copy(update={"dtype": params.dtype}),
                max_tokens=params.max_tokens,
                batch_size=params.batch_size,
            )
        case "hash":
            try:
                return HashTeacher(**params.options)
            except (TypeError, ValueError) as error:
                raise TeacherError(f"embed.teacher.options {params.options}: {error}") from None
