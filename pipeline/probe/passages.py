"""Passages: cut from documents, written out with their titles, and searched exactly in one pass over any corpus."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline.core.errors import EvaluationError
from pipeline.tasks.local_tasks import RetrievalData

if TYPE_CHECKING:
    from pipeline.evaluate.system import System

CHUNK = 8192


def cut_documents(data: RetrievalData, words: int) -> tuple[RetrievalData, int]:
    """The documents of a task cut into passages, as AdvBench-IR is measured, and how many tails that drops.

    A passage is `words` words, split at white space and joined by single spaces; what is left over at a document's end
    is dropped, unless the document has no more than that. Judgements follow the document. A document of one passage
    keeps its id, others get `#0`, `#1`, ... behind it; running this again changes nothing.

    Raises:
        EvaluationError: two passages get one id.
    """
    rows: list[dict[str, str]] = []
    parts: dict[str, list[str]] = {}
    dropped = 0
    for document in data.corpus.to_pylist():
        passages, has_tail = _cut(document["text"], words)
        names = [document["id"]] if len(passages) == 1 else [f"{document['id']}#{n}" for n in range(len(passages))]
        rows += [document | {"id": name, "text": text} for name, text in zip(names, passages, strict=True)]
        parts[document["id"]] = names
        dropped += has_tail
    corpus = pa.Table.from_pylist(rows, data.corpus.schema)
    if len({row["id"] for row in rows}) != len(rows):
        raise EvaluationError("documents cut into passages: two passages get one id; rename documents that end in #<n>")
    relevant = {
        query: {name: score for document, score in scores.items() for name in parts[document]}
        for query, scores in data.relevant.items()
    }
    return RetrievalData(data.queries, corpus, relevant, None), dropped


def _cut(text: str, words: int) -> tuple[list[str], bool]:
    """The passages of a text, and whether a tail was dropped."""
    tokens = text.split()
    full = len(tokens) // words
    if not full:
        return [" ".join(tokens)], False
    return [" ".join(tokens[words * n : words * (n + 1)]) for n in range(full)], len(tokens) % words > 0


def passage_texts(corpus: pa.Table) -> list[str]:
    """The text of each passage: "title # passage", the passage alone where there is no title."""
    pairs = zip(corpus["title"].to_pylist(), corpus["text"].to_pylist(), strict=True)
    return [f"{title} # {text}" if title else text for title, text in pairs]


def search(
    system: "System", queries: np.ndarray, passages: Sequence[str], instruction: str, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The passages nearest to each query by cosine.

    Args:
        system: embeds the passages, chunk by chunk.
        queries: float32 [Q, d].
        passages: N texts.
        instruction: for the passages.
        top: how many to keep.

    Returns:
        Positions int64 [Q, min(top, N)] and cosines float32 of the same shape, best first; on a tie
        the earlier passage.
    """
    unit = unit_rows(queries)
    positions = np.empty((len(queries), 0), dtype=np.int64)
    cosines = np.empty((len(queries), 0), dtype=np.float32)
    for start in range(0, len(passages), CHUNK):
        chunk = passages[start : start + CHUNK]
        scores = unit @ unit_rows(system.encode(chunk, instruction, "document")).T
        numbers = np.broadcast_to(np.arange(start, start + len(chunk)), scores.shape)
        cosines, positions = np.hstack([cosines, scores]), np.hstack([positions, numbers])
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
        cosines, positions = np.take_along_axis(cosines, best, 1), np.take_along_axis(positions, best, 1)
    return positions, cosines


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, float32 [N, d]; a zero row stays zero.

    Raises:
        EvaluationError: a value is not finite.
    """
    if not np.isfinite(vectors).all():
        raise EvaluationError(f"{int((~np.isfinite(vectors).all(axis=1)).sum())} embeddings are not finite")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)
