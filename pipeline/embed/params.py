"""Section `embed` of params.yaml."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.core.config import Params
from pipeline.core.target_transform import TransformParams
from pipeline.embed.teachers import TeacherParams
from pipeline.parallel.devices import Count

if TYPE_CHECKING:
    pass


TargetType = Literal["float16", "float32"]


class EmbedParams(Params):
    """Section `embed`."""

    teacher: TeacherParams
    normalize: bool = Field(default=False, description="scale targets to length 1; changes the balance of the losses")
    transform: TransformParams = Field(default=TransformParams(), description="of the targets; see docs/targets.md")
    dtype: TargetType = Field(default="float16", description="of the stored targets")
    data_parallel: Count = Field(default="auto", description="teacher processes; auto: one a GPU")
