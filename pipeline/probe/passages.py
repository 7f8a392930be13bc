"""Passages: cut from documents, joined with their titles, and searched exactly in one pass over the corpus."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.core.errors import EvaluationError
from pipeline.core.vectors import top_k
from pipeline.evaluate.system import System, encode_finite
from pipeline.tasks.local_tasks import RetrievalData

CHUNK = 8192


def cut_documents(data: RetrievalData, words: int) -> tuple[RetrievalData, int]:
    """The documents of a task cut into passages, as AdvBench-IR is measured, and the number of dropped tails.

    A passage has `words` words, split at white space and joined by single spaces. A shorter tail is dropped unless it
    is the whole document. Judgements follow the document. The only passage of a document keeps its id, others append
    `#0`, `#1`, ...; cutting twice changes nothing. Raises EvaluationError if two passages get one id.
    """
    rows: list[dict[str, str]] = []
    passages_of: dict[str, list[str]] = {}
    dropped = 0
    for document in data.corpus.to_pylist():
        passages, has_tail = _cut(document["text"], words)
        names = [document["id"]] if len(passages) == 1 else [f"{document['id']}#{n}" for n in range(len(passages))]
        rows += [document | {"id": name, "text": text} for name, text in zip(names, passages, strict=True)]
        passages_of[document["id"]] = names
        dropped += has_tail
    corpus = pa.Table.from_pylist(rows, data.corpus.schema)
    if repeated := [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]:
        what = f"two passages get one id, {repeated[0]}"
        raise EvaluationError(f"documents cut into passages: {what}: rename documents that end in #<n>")
    relevant = {
        query: {name: score for document, score in scores.items() for name in passages_of[document]}
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
    """ "title # passage" of each passage; the passage alone where there is no title."""
    pairs = zip(corpus["title"].to_pylist(), corpus["text"].to_pylist(), strict=True)
    return [f"{title} # {text}" if title else text for title, text in pairs]


def search(
    system: System, queries: np.ndarray, passages: Sequence[str], instruction: str, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions int64 [Q, min(top, N)] of the nearest of N passages to queries float32 [Q, d], and their cosines.

    Best first; on a tie the earlier passage. `system` embeds the passages in chunks, with `instruction`.
    """
    chunks = (passages[start : start + CHUNK] for start in range(0, len(passages), CHUNK))
    vectors = (encode_finite(system, chunk, instruction, "document", where="passages") for chunk in chunks)
    return top_k(queries, vectors, top)
