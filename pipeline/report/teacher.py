"""The teacher on the page: which it is, what that means, and how good one that was trained here was found to be."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import read_manifest
from pipeline.errors import ArtifactError
from pipeline.trained_teacher import TRAINED, TRAINED_TEACHER

_MEANING = {
    "llm2vec": "a published LLM2Vec, trained without labels: the paper's own teacher where the backbone is the paper's",
    TRAINED: "trained here from unlabeled text: the paper's figures are for another teacher",
    "backbone": "the backbone itself, not trained for embedding: the run needs no other model",
    "sentence-transformers": "a published embedder, which may have been trained on labelled pairs: to beat it is not "
    "the paper's claim",
    "hash": "a stub that knows nothing",
}


@dataclass(frozen=True)
class TeacherFacts:
    """What is said of the teacher.

    Attributes:
        kind: as in `embed.teacher.kind`.
        meaning: what that means for the numbers.
        transform: kind of `embed.transform`, "none" without one.
        scores: of one trained here: a row a task, its score by system.
        worse: that it is no better than mean pooling, in words; None where it is or was not measured.
    """

    kind: str
    meaning: str
    transform: str
    scores: Mapping[str, Mapping[str, float]]
    worse: str | None


def teacher_facts(root: Path, trained: Mapping[str, Any] | None) -> TeacherFacts | None:
    """Of the workspace's targets; None where there are none. `trained` is the record of the stage teach, if it ran."""
    try:
        manifest = read_manifest(root / "data/targets").manifest
    except ArtifactError:
        return None
    identity = manifest.models.get("teacher")
    if not isinstance(identity, dict):
        return None
    kind = _kind(identity)
    record = (trained or {}) if kind == TRAINED else {}
    transform = manifest.params.get("transform") or {"kind": "none"}
    meaning = _MEANING.get(kind, "") + _text_of(record)
    return TeacherFacts(kind, meaning, transform["kind"], _scores(record), record.get("worse_than_mean_pooling"))


def trained_here(root: Path) -> bool:
    """Whether the workspace holds a teacher that the stage teach was asked for."""
    try:
        return bool(read_manifest(root / TRAINED_TEACHER).manifest.params.get("asked"))
    except ArtifactError:
        return False


def _text_of(record: Mapping[str, Any]) -> str:
    """What a teacher that was trained here read; of sources nobody looked for the held-out queries."""
    corpus = (record.get("corpus") or {}).get("kind")
    if corpus is None:
        return ""
    return "; its text is teach.sources" if corpus == "sources" else f"; its text is this run's own ({corpus})"


def _kind(identity: Mapping[str, Any]) -> str:
    adapters = [str(adapter.get("name", "")) for adapter in identity.get("adapters", ())]
    own = bool(adapters) and all(name.startswith(f"{TRAINED_TEACHER.as_posix()}/") for name in adapters)
    return TRAINED if own else str(identity.get("kind", ""))


def _scores(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for key, score in (record.get("metrics") or {}).items():
        system, _, task = key.partition("/")
        if not task.startswith("type/") and task != "mean/types":
            table.setdefault(task, {})[system] = score
    return table
