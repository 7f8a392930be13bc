"""The kinds of teachers. Adding one = a module beside this one that loads it, and one entry of `TEACHERS`."""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Final

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import nested_in, section

if TYPE_CHECKING:
    from pipeline.embed.params import TeacherParams
    from pipeline.embed.teachers.base import Teacher

TRAINED: Final = "llm2vec-trained"
COMMON_KEYS = ("max_tokens", "dtype", "batch_size")  # every kind accepts them


@dataclass(frozen=True)
class TeacherKind:
    """What is known of a teacher without loading it.

    Attributes:
        load: dotted path of what loads it; called with the keys of `embed.teacher` in `reads`.
        reads: further keys than `COMMON_KEYS` must keep their defaults unless they are here.
        meaning: what scores against it say, for the report.
        needs: keys that must be set.
        on_backbone: `load` also gets the backbone, as `backbone`.
        raw_norms: its vectors are unscaled hidden states, with norms in the hundreds.
        parallel: `data_parallel: auto` starts one process a GPU.
        trained_here: the stage teach makes it.
        stub: its vectors mean nothing.
    """

    load: str
    reads: tuple[str, ...]
    meaning: str
    needs: tuple[str, ...] = ()
    on_backbone: bool = False
    raw_norms: bool = False
    parallel: bool = True
    trained_here: bool = False
    stub: bool = False


TEACHERS: dict[str, TeacherKind] = {
    "llm2vec": TeacherKind(
        load="pipeline.embed.teachers.llm2vec:load_llm2vec",
        reads=(*COMMON_KEYS, "name", "revision", "adapters", "template", "pooling", "trust_remote_code"),
        needs=("adapters",),
        on_backbone=True,
        raw_norms=True,
        meaning="a published LLM2Vec, trained without labels: the paper's own teacher where the backbone is the "
        "paper's",
    ),
    TRAINED: TeacherKind(
        load="pipeline.embed.teachers.trained:load_trained",
        reads=(*COMMON_KEYS, "template", "pooling"),
        on_backbone=True,
        raw_norms=True,
        trained_here=True,
        meaning="trained here from unlabeled text: the paper's figures are for another teacher",
    ),
    "backbone": TeacherKind(
        load="pipeline.embed.teachers.backbone:load_backbone_teacher",
        reads=(*COMMON_KEYS, "template", "pooling"),
        on_backbone=True,
        raw_norms=True,
        meaning="the backbone itself, not trained for embedding: the run needs no other model",
    ),
    "sentence-transformers": TeacherKind(
        load="pipeline.embed.teachers.sentence_transformers:SentenceTransformersTeacher",
        reads=(*COMMON_KEYS, "name", "revision", "prompt", "trust_remote_code"),
        needs=("name",),
        meaning="a published embedder, which may have been trained on labelled pairs: to beat it is not the paper's "
        "claim",
    ),
    "hash": TeacherKind(
        load="pipeline.embed.teachers.stub:HashTeacher.from_options",
        reads=("options",),
        parallel=False,
        stub=True,
        meaning="a stub that knows nothing",
    ),
}


def build_teacher(params: "TeacherParams", backbone: BackboneParams) -> "Teacher":
    """Load the teacher of the params.

    Args:
        params: section `embed.teacher`.
        backbone: for the kinds that are built on it.

    Raises:
        TeacherError: it cannot be loaded with these params.
        BackboneError: the language model that it is built on cannot be loaded.
    """
    kind = TEACHERS[params.kind]
    arguments: dict[str, Any] = {key: getattr(params, key) for key in kind.reads}
    if kind.on_backbone:
        arguments["backbone"] = backbone
    with section("embed"), nested_in("teacher"):
        teacher: Teacher = resolve_name(kind.load)(**arguments)
    return teacher
