"""The passages of a corpus nearest to a query: `python -m pipeline search --model DIR --corpus FILE "query"`.

A corpus that `encode` has written as Parquet, by the same encoder and with the same instruction, is not embedded again.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from heapq import nlargest
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.encoding import EMBEDDED_BY, made_by
from pipeline.errors import SourceError
from pipeline.runtime import progress
from pipeline.text_files import TextFile

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from pipeline.encoder.inference import Encoder

log = logging.getLogger(__name__)

# Passages embedded and compared at once.
CHUNK_ROWS = 512
CELL_CHARS = 300


class Hit(NamedTuple):
    """A passage found: its row in the corpus, its cosine to the query, its text."""

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

    Args:
        encoder: embeds both sides.
        corpus: the passages; in memory are a few hundred at a time.
        query: not empty.
        count: at least 1.
        instruction: of the query.
        document_instruction: of the passages.

    Raises:
        SourceError: the query is empty, or the corpus is damaged.
    """
    if not query.strip():
        raise SourceError("the query is empty: give some text to search for")
    wanted = encoder.encode([query], instruction=instruction)[0]
    if _is_embedded(encoder, corpus, document_instruction):
        log.info("%s holds embeddings by this encoder: nothing is embedded again", corpus.path)
        return nearest(wanted, _stored(corpus), count)
    return nearest(wanted, _embedded(encoder, corpus, document_instruction), count)


def nearest(
    query: "np.ndarray[Any, Any]", passages: "Iterable[tuple[Sequence[str], np.ndarray[Any, Any]]]", count: int
) -> list[Hit]:
    """The `count` passages of largest cosine to `query` `[e]`, best first.

    Args:
        query: of any length.
        passages: texts and their embeddings `[B, e]`, chunk by chunk.
        count: at least 1.
    """
    best: list[Hit] = []
    row = 0
    for texts, embeddings in passages:
        scores = _cosines(embeddings, query)
        found = [Hit(row + at, float(score), text) for at, (score, text) in enumerate(zip(scores, texts, strict=True))]
        best = nlargest(count, [*best, *found], key=lambda hit: (hit.score, -hit.row))
        row += len(texts)
    return best


def _cosines(rows: "np.ndarray[Any, Any]", query: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    import numpy as np

    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(query)
    return (rows @ query) / np.maximum(lengths, np.finfo(np.float32).tiny)


def _embedded(
    encoder: "Encoder", corpus: TextFile, instruction: str
) -> "Iterator[tuple[list[str], np.ndarray[Any, Any]]]":
    nothing: list[str] = []
    truncated = 0
    with progress(nothing, total=corpus.rows, desc="embed the corpus", unit="text") as bar:
        for chunk in corpus.chunks(CHUNK_ROWS):
            found = encoder.embed(chunk, instruction=instruction)
            yield chunk, found.vectors
            truncated += found.truncated
            bar.update(len(chunk))
    if truncated:
        log.warning("%s", encoder.config.cut(truncated, corpus.rows))


def _is_embedded(encoder: "Encoder", corpus: TextFile, instruction: str) -> bool:
    """Whether `encode` wrote the corpus, with this encoder and instruction."""
    if corpus.path.suffix != ".parquet" or corpus.column != "text":
        return False
    metadata = pq.read_schema(corpus.path).metadata or {}
    if EMBEDDED_BY not in metadata:
        return False
    theirs, ours = json.loads(metadata[EMBEDDED_BY]), made_by(encoder, instruction)
    if theirs == ours:
        return True
    what = "another encoder" if theirs["encoder"] != ours["encoder"] else "another backbone or instruction"
    log.info("%s holds embeddings by %s: its texts are embedded again", corpus.path, what)
    return False


def _stored(corpus: TextFile) -> "Iterator[tuple[list[str], np.ndarray[Any, Any]]]":
    try:
        with pq.ParquetFile(corpus.path) as file:
            for batch in file.iter_batches(CHUNK_ROWS, columns=["text", "embedding"]):
                vectors = batch.column("embedding").flatten().to_numpy().reshape(batch.num_rows, -1)
                yield batch.column("text").to_pylist(), vectors
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{corpus.option}: {corpus.path} is damaged: {error}") from None


def table(hits: Sequence[Hit]) -> "Table":
    """The hits as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Column, Table

    found = Table("rank", "cosine", "row", Column("passage", overflow="fold"), show_lines=True)
    for rank, hit in enumerate(hits, start=1):
        text = hit.text if len(hit.text) <= CELL_CHARS else hit.text[:CELL_CHARS] + "…"
        found.add_row(str(rank), f"{hit.score:.4f}", f"{hit.row:,}", escape(text))
    return found
