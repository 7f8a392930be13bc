"""Section `embed` of params.yaml."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.backbone.loading import DType
from pipeline.backbone.prompting import SLOT
from pipeline.core.config import Params, check_unread_keys
from pipeline.core.target_transform import TransformParams
from pipeline.core.tracking import Tracker
from pipeline.embed.teachers.adapters import AdapterParams
from pipeline.embed.teachers.registry import COMMON_KEYS, TEACHERS
from pipeline.embed.teachers.template import TEMPLATES, Pooling, template_of
from pipeline.parallel.devices import Spread

TargetType = Literal["float16", "float32"]


def _known_kind(kind: str) -> str:
    if kind not in TEACHERS:
        raise ValueError(f"known are {', '.join(TEACHERS)}")
    return kind


class TeacherParams(Params):
    """The embedding model whose vectors the student learns (`embed.teacher`)."""

    kind: Annotated[str, AfterValidator(_known_kind)]
    name: str | None = Field(default=None, description="hub name or local folder; of llm2vec null = the backbone")
    revision: str | None = Field(default=None, description="commit on the hub; pin it")
    adapters: list[AdapterParams] = Field(default_factory=list, description="of llm2vec, merged in order: MNTP, SimCSE")
    max_tokens: int = Field(default=512, ge=1, description="longer texts lose their end")
    dtype: DType = Field(default="float32", description="of the teacher's weights")
    batch_tokens: int | None = Field(
        default=None, ge=1, description="tokens of one forward pass, padding included; null = by the device"
    )
    template: Annotated[str, BeforeValidator(template_of)] = Field(
        default=SLOT, description="of llm2vec and backbone: pooled from its last {text} on; or text, echo, one-word"
    )
    pooling: Pooling = Field(default="mean", description="of llm2vec and backbone; mean-all: special tokens as well")
    prompt: str = Field(default="", description="put before each text; only of kind sentence-transformers")
    trust_remote_code: bool = False
    options: dict[str, Any] = Field(default_factory=dict, description="of kind `hash`: width, delay")

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        kind, fields = TEACHERS[self.kind], type(self).model_fields
        check_unread_keys(self, fields.keys() - {"kind", *COMMON_KEYS, *kind.reads})
        for key in kind.needs:
            if not getattr(self, key):
                raise ValueError(f"kind {self.kind} needs {key} ({fields[key].description})")
        if self.name is None and self.revision is not None:
            raise ValueError("a revision needs a name")
        if SLOT not in self.template:
            raise ValueError(f"template {self.template!r} holds no {SLOT} and is none of {', '.join(TEMPLATES)}")
        if self.template == TEMPLATES["one-word"] and self.pooling != "last":
            raise ValueError("template one-word needs pooling last: no earlier token has read the question")
        return self


class TeacherSection(Params, extra="ignore"):
    """Section `embed` of a stage that reads its teacher alone."""

    teacher: TeacherParams


class TargetGates(Params):
    """What may be wrong with the targets; more fails the stage, and its vectors are kept."""

    equal: float = Field(default=0.5, ge=0, le=1, description="share that repeats another row's target")
    zero: float = Field(default=0.01, ge=0, le=1, description="share of length 0")
    odd_length: float = Field(default=0.05, ge=0, le=1, description="share over 10 times longer or shorter than usual")
    cosine: float = Field(default=0.999, ge=0, le=1, description="mean cosine of two targets; 1 = all point one way")


class EmbedParams(Params):
    """Section `embed`."""

    teacher: TeacherParams
    queries: bool = Field(
        default=False, description="embed the queries too, for train.response_form added with any teacher"
    )
    normalize: bool = Field(default=False, description="scale targets to length 1; changes the balance of the losses")
    transform: TransformParams = Field(default=TransformParams(), description="of the targets; see docs/targets.md")
    dtype: TargetType = Field(default="float16", description="of the stored targets")
    data_parallel: Spread = Field(
        default="auto", description="teacher processes; auto: one a GPU; ray: on the cluster of $RAY_ADDRESS"
    )
    track: Tracker | None = Field(default=None, exclude=True, description="progress and tokens a second, live")
    gates: TargetGates = Field(default=TargetGates(), description="what may be wrong with the targets")
