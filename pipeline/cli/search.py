"""The passages of a corpus nearest to a query: `python -m pipeline search --model DIR --corpus FILE "query"`.

Embeddings that `encode` wrote as Parquet, by the same encoder with the same instruction, are reused, centred or not:
cosines are as asked for, since the mean is stored with them.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.core.errors import SourceError
from pipeline.core.readers import TextFile
from pipeline.core.readers.rows import parquet_batches
from pipeline.core.run import progress
from pipeline.core.text import normalize_text, visible
from pipeline.core.vectors import top_k
from pipeline.encoder.embedded_by import CORPUS, center_of, mean_of, not_made_by, read_center, stored_in

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

    from pipeline.encoder.inference import Encoder

    Array = np.ndarray[Any, Any]

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
    center: str | None = None,
) -> list[Hit]:
    """The `count` passages of largest cosine to the query, best first; of equal ones the first in the corpus.

    `center` is subtracted from query and passages: "corpus" the mean embedding of the corpus, the path of what encode
    wrote with a mean that one. A few hundred passages are in memory at a time.

    Raises:
        SourceError: the query is empty, the corpus is damaged or changes meanwhile, or `center` names no mean of this
            encoder's.
    """
    if not query.strip():
        raise SourceError("the query is empty: give some text to search for")
    mean = None if center is None or center == CORPUS else read_center(encoder, Path(center))
    wanted = encoder.encode([query], instruction=instruction)
    with ExitStack() as stack:
        reused = _is_embedded(encoder, corpus, document_instruction)
        vectors = _vectors(stack, encoder, corpus, document_instruction, reused=reused, again=center == CORPUS)
        if center == CORPUS:
            mean = _mean(corpus, vectors, reused=reused)
        compared = vectors() if mean is None else (block - mean for block in vectors())
        rows, cosines = top_k(wanted if mean is None else wanted - mean, compared, count)
    texts = _texts(corpus, set(rows[0].tolist()))
    return [Hit(row, score, texts[row]) for row, score in zip(rows[0].tolist(), cosines[0].tolist(), strict=True)]


def _vectors(
    stack: ExitStack, encoder: "Encoder", corpus: TextFile, instruction: str, *, reused: bool, again: bool
) -> "Callable[[], Iterator[Array]]":
    """Reads the embeddings of all passages in blocks, `again` as often as needed; `stack` frees what they lie in.

    `reused`: the corpus holds them.
    """
    if reused:
        log.info("%s holds embeddings by this encoder: nothing is embedded again", corpus.path)
        return partial(_stored, corpus, encoder.width)
    made = partial(_embedded, encoder, corpus, instruction)
    return stack.enter_context(_kept(made())) if again else made


@contextmanager
def _kept(blocks: "Iterator[Array]") -> "Iterator[Callable[[], Iterator[Array]]]":
    """The blocks in a file without a name."""
    import numpy as np

    with TemporaryFile() as file:
        for block in blocks:
            np.save(file, block)
        end = file.tell()

        def read() -> "Iterator[Array]":
            file.seek(0)
            while file.tell() < end:
                yield np.load(file)

        yield read


def _mean(corpus: TextFile, vectors: "Callable[[], Iterator[Array]]", *, reused: bool) -> "Array":
    """The mean embedding of the corpus: where its embeddings are `reused`, the one stored with them if there is one."""
    [file, *others] = corpus.files
    # A mean beside embeddings that are not used is of another encoder, or behind another instruction.
    stored = center_of(file.path) if reused and not others else None
    return mean_of(vectors()) if stored is None else stored


def _texts(corpus: TextFile, rows: set[int]) -> dict[int, str]:
    found = {row: text for row, text in enumerate(corpus) if row in rows}
    if found.keys() != rows:
        raise SourceError(f"{corpus.path} changed while it was searched: run again", argument="corpus")
    return found


def _embedded(encoder: "Encoder", corpus: TextFile, instruction: str) -> "Iterator[Array]":
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
        reason = not_made_by(encoder, file.path, instruction, centered=True)
        if reason is not None:
            log.info("%s %s: its texts are embedded now", file, reason)
            return False
    if corpus.tidy and any(text != normalize_text(text) for text in replace(corpus, tidy=False)):
        log.info("%s holds embeddings of texts that are not tidy: they are embedded now, tidied", corpus.path)
        return False
    return True


def _stored(corpus: TextFile, width: int) -> "Iterator[Array]":
    """With the mean that a file's embeddings lack."""
    for file in corpus.files:
        mean = center_of(file.path)
        for batch in parquet_batches(file, CHUNK_ROWS, ["embedding"]):
            vectors = stored_in(file.path, batch.column("embedding"), width)
            yield vectors if mean is None else vectors + mean


def table(hits: Sequence[Hit]) -> "Table":
    """The passages as a table for the terminal, long ones shortened."""
    from rich.markup import escape
    from rich.table import Column, Table

    found = Table("rank", "cosine", "row", Column("passage", overflow="fold"), show_lines=True)
    for rank, hit in enumerate(hits, start=1):
        shown = visible(hit.text)
        text = shown if len(shown) <= CELL_CHARS else shown[:CELL_CHARS] + "…"
        found.add_row(str(rank), f"{hit.score:.4f}", f"{hit.row:,}", escape(text))
    return found
