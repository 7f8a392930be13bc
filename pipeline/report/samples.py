"""The rows of the probe `interpret`, as the report prints them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import read_manifest


@dataclass(frozen=True)
class Sample:
    """What one held-out query's embedding holds; None and empty are what the artifact does not say.

    Attributes:
        faithfulness: the decoded text's cosine to the response, in the teacher's space.
        to_embedding: the decoded text's cosine to the embedding itself, there too.
    """

    query: str
    response: str
    decoded: str
    faithfulness: float | None
    to_embedding: float | None
    vocabulary: list[str]


def read_samples(folder: Path) -> list[Sample]:
    """The rows of the artifact in `folder`.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return [
        Sample(
            query=row.get("query") or "",
            response=row.get("response") or "",
            decoded=row.get("decoded") or "",
            faithfulness=row.get("cosine_response", row.get("faithfulness")),
            to_embedding=row.get("cosine_embedding"),
            vocabulary=_words(row.get("vocabulary") or []),
        )
        for row in read_manifest(folder).read("rows.parquet").to_pylist()
    ]


def _words(per_token: Sequence[Sequence[Any]]) -> list[str]:
    """The words nearest to any token, each once, in the order of their first appearance by rank."""
    deepest = max((len(words) for words in per_token), default=0)
    ranked = (_word(words[rank]) for rank in range(deepest) for words in per_token if rank < len(words))
    return list(dict.fromkeys(word for word in ranked if word))[:16]


def _word(entry: Any) -> str:
    """A word as it is, or with its probability beside it."""
    return str(entry.get("word", "") if isinstance(entry, dict) else entry).strip()
