"""The passages of a corpus nearest to a query: `python -m pipeline search --model DIR --corpus FILE "query"`.

Embeddings that `encode` wrote as Parquet, by the same encoder with the same instruction, are reused.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.core.errors import SourceError
from pipeline.core.readers import TextFile
from pipeline.core.readers.rows import parquet_batches
from pipeline.core.run import progress
from pipeline.core.text import visible
from pipeline.core.vectors import matrix, top_k
from pipeline.encoder.encode_file import not_made_by

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from pipeline.encoder.inference import Encoder

log = logging.getLogger(__name__)

# Passages embedded and compared at once.
CHUNK_ROWS = 512
CELL_CHARS = 300


class Hit(NamedTuple):
    """A passage: its row in the corpus, its cosine to the query, its text."""

    row: int
    score: float
    text: str


def search(
    encoder: "Encoder",
    corpus: TextFile,
    query: str,
    *,
    count: int = 5,
    instruction: str = "",
    document_instruction: str = "",
) -> list[Hit]:
    """The `count` passages of largest cosine to the query, best first; of equal ones the first in the corpus.

    A few hundred passages are in memory at a time.

    Raises:
        SourceError: the query is empty, or the corpus is damaged or changes meanwhile.
    """
    if not query.strip():
        raise SourceError("the query is empty: give some text to search for")
    wanted = encoder.encode([query], instruction=instruction)
    if _is_embedded(encoder, corpus, document_instruction):
        log.info("%s holds embeddings by this encoder: nothing is embedded again", corpus.path)
        vectors = _stored(corpus)
    else:
        vectors = _embedded(encoder, corpus, document_instruction)
    rows, cosines = top_k(wanted, vectors, count)
    texts = _texts(corpus, set(rows[0].tolist()))
    return [Hit(row, score, texts[row]) for row, score in zip(rows[0].tolist(), cosines[0].tolist(), strict=True)]


def _texts(corpus: TextFile, rows: set[int]) -> dict[int, str]:
    found = {row: text for row, text in enumerate(corpus) if row in rows}
    if found.keys() != rows:
        raise SourceError(f"{corpus.path} changed while it was searched: run again", argument="corpus")
    return found


def _embedded(encoder: "Encoder", corpus: TextFile, instruction: str) -> "Iterator[np.ndarray[Any, Any]]":
    nothing: list[str] = []
    truncated = 0
    with progress(nothing, total=corpus.rows, desc="embed the corpus", unit="text") as bar:
        for chunk in corpus.chunks(CHUNK_ROWS):
            found = encoder.embed(chunk, instruction=instruction)
            yield found.vectors
            truncated += found.truncated
            bar.update(len(chunk))
    if truncated:
        log.warning("%s", encoder.config.truncation_note(truncated, corpus.rows))


def _is_embedded(encoder: "Encoder", corpus: TextFile, instruction: str) -> bool:
    if corpus.files[0].format != ".parquet" or corpus.column != "text":
        return False
    for file in corpus.files:
        reason = not_made_by(encoder, file.path, instruction)
        if reason is not None:
            log.info("%s %s: its texts are embedded now", file, reason)
            return False
    return True


def _stored(corpus: TextFile) -> "Iterator[np.ndarray[Any, Any]]":
    for file in corpus.files:
        for batch in parquet_batches(file, CHUNK_ROWS, ["embedding"]):
            yield matrix(batch.column("embedding"))


def table(hits: Sequence[Hit]) -> "Table":
    from rich.markup import escape
    from rich.table import Column, Table

    found = Table("rank", "cosine", "row", Column("passage", overflow="fold"), show_lines=True)
    for rank, hit in enumerate(hits, start=1):
        shown = visible(hit.text)
        text = shown if len(shown) <= CELL_CHARS else shown[:CELL_CHARS] + "…"
        found.add_row(str(rank), f"{hit.score:.4f}", f"{hit.row:,}", escape(text))
    return found
