"""The kinds of teachers, known without loading one. Adding one = a module, an entry here and its loader in `load`."""

from dataclasses import dataclass
from typing import Final

TRAINED: Final = "llm2vec-trained"
COMMON_KEYS = ("max_tokens", "dtype", "batch_tokens")  # every kind accepts them


@dataclass(frozen=True)
class TeacherKind:
    """What is known of a teacher without loading it.

    Attributes:
        reads: keys of `embed.teacher` that it takes; all but `COMMON_KEYS` must keep their defaults unless here.
        meaning: what scores against it say, for the report.
        needs: keys that must be set.
        on_backbone: it is built on the backbone.
        raw_norms: its vectors are unscaled hidden states, with norms in the hundreds.
        parallel: `data_parallel: auto` starts one process a GPU.
        trained_here: the stage teach makes it.
        stub: its vectors mean nothing.
    """

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
        reads=(*COMMON_KEYS, "name", "revision", "adapters", "template", "pooling", "trust_remote_code"),
        needs=("adapters",),
        on_backbone=True,
        raw_norms=True,
        meaning="a published LLM2Vec, trained without labels: the paper's own teacher where the backbone is the "
        "paper's",
    ),
    TRAINED: TeacherKind(
        reads=(*COMMON_KEYS, "template", "pooling"),
        on_backbone=True,
        raw_norms=True,
        trained_here=True,
        meaning="trained here from unlabeled text: the paper's figures are for another teacher",
    ),
    "backbone": TeacherKind(
        reads=(*COMMON_KEYS, "template", "pooling"),
        on_backbone=True,
        raw_norms=True,
        meaning="the backbone itself, not trained for embedding: the run needs no other model",
    ),
    "sentence-transformers": TeacherKind(
        reads=(*COMMON_KEYS, "name", "revision", "prompt", "trust_remote_code"),
        needs=("name",),
        meaning="a published embedder, which may have been trained on labelled pairs: to beat it is not the paper's "
        "claim",
    ),
    "hash": TeacherKind(reads=("options",), parallel=False, stub=True, meaning="a stub that knows nothing"),
}
