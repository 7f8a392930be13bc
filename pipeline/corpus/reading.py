"""Sources to staged texts: normalised, measured in characters, numbered in their order."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from pipeline import queries
from pipeline.corpus.staging import Staging
from pipeline.runtime import progress
from pipeline.sources import HubSource, LocalSource, read_texts

BATCH_ROWS = 4096
BATCH_CHARS = 4_000_000


def stage_sources(
    sources: Sequence[LocalSource | HubSource],
    local_dir: Path,
    staging: Staging,
    *,
    min_chars: int,
    max_chars: int,
) -> pl.DataFrame:
    """Read all sources; texts that are not left out by their length go to `staging`.

    Args:
        sources: in order.
        local_dir: where relative paths start.
        staging: receives the texts, and is finished here.
        min_chars: shorter texts are left out.
        max_chars: longer texts are left out.

    Returns:
        The frame of `pipeline.queries`, one row a text.

    Raises:
        SourceError: a source cannot be read.
        WorkError: the disk is full.
    """
    frames, first = [queries.to_frame(0, []).drop("text")], 0
    for number, source in enumerate(sources):
        rows = progress(read_texts(source, local_dir), total=None, desc=f"read {source.label}")
        for texts in _batched(rows):
            frame = queries.to_frame(number, texts)
            frame = queries.drop_lengths(frame, min_chars=min_chars, max_chars=max_chars)
            kept = np.flatnonzero(queries.undecided(frame))
            staging.add(first + kept, frame["id"].gather(kept), frame["text"].gather(kept))
            frames.append(frame.drop("text"))
            first += len(texts)
    staging.finish()
    return queries.drop_duplicates(pl.concat(frames))


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, chars = list[str](), 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if len(batch) >= BATCH_ROWS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
