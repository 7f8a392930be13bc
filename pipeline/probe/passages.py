"""Passages: cut from documents, written out with their titles, and searched exactly in one pass over any corpus."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from pipeline.core.errors import EvaluationError
from pipeline.core.vectors import top_k
from pipeline.evaluate.system import System, check_finite
from pipeline.tasks.instructions import Side
from pipeline.tasks.local_tasks import RetrievalData

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
    system: System, queries: np.ndarray, passages: Sequence[str], instruction: str, top: int
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

    def vectors() -> Iterator[np.ndarray]:
        for start in range(0, len(passages), CHUNK):
            yield finite_embeddings(system, passages[start : start + CHUNK], instruction, "document")

    return top_k(queries, vectors(), top)


def finite_embeddings(system: System, texts: Sequence[str], instruction: str, side: Side = "query") -> np.ndarray:
    """`System.encode`, float32 [N, d].

    Raises:
        EvaluationError: a value is not finite.
    """
    embeddings = system.encode(texts, instruction, side)
    check_finite(embeddings, texts, system.name)
    return embeddings
