"""A few queries: of those that were collected, or of the first rows of the sources."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.backbone.loading import BackboneParams
from pipeline.collect.corpus import Corpus
from pipeline.collect.params import CollectParams
from pipeline.collect.selection import select
from pipeline.core.artifacts import open_artifact, read_manifest
from pipeline.core.errors import ArtifactError, SourceError
from pipeline.core.paths import QUERIES_DIR, TRAIN_TABLE
from pipeline.optim.batching import epoch_order

# Rows of each source that are read for one query: short, long and repeated ones are left out.
READ_FACTOR = 32
# Too few to compare with each other.
LEAST = 2


class Few(NamedTuple):
    """Queries in schema QUERIES, and where they are from."""

    table: pa.Table
    origin: str


def few_queries(params: CollectParams, backbone: BackboneParams, count: int, scratch: Path) -> Few:
    """`count` queries, or as many as there are.

    Of training queries that were collected with these params, a sample. Else of the first rows of each source, filtered
    as collect does, but compared with no text of the evaluation.

    Raises:
        SourceError: a source cannot be read, or fewer than two queries are usable.
        BackboneError, ParamsError, WorkError: the tokenizer, the params or the disk cannot be used.
    """
    found = _collected(params, count)
    if found is None:
        found = _first_rows(params, backbone, count, scratch)
    if found.table.num_rows < LEAST:
        raise SourceError(f"{found.table.num_rows} usable queries ({found.origin}), at least {LEAST} are needed")
    return found


def _collected(params: CollectParams, count: int) -> Few | None:
    with contextlib.suppress(ArtifactError):
        if read_manifest(QUERIES_DIR).manifest.params == params.model_dump(mode="json"):
            table = open_artifact(QUERIES_DIR, QUERIES_DIR.name).read(TRAIN_TABLE)
            chosen = np.sort(epoch_order(table.num_rows, 0, params.seed)[:count])
            return Few(table.take(pa.array(chosen)), f"a sample of the {table.num_rows:,} of {QUERIES_DIR}")
    return None


def _first_rows(params: CollectParams, backbone: BackboneParams, count: int, scratch: Path) -> Few:
    most = count * READ_FACTOR
    sources = [source.model_copy(update={"limit": min(source.limit or most, most)}) for source in params.sources]
    # All rows become training queries: the smallest fraction that there is holds out none.
    fewer = params.model_copy(
        update={"sources": sources, "decontaminate": None, "sample": count, "heldout_fraction": 0.0}
    )
    with contextlib.closing(Corpus(scratch, sources, compared=params.near_duplicates is not None)) as corpus:
        select(corpus, fewer, backbone, [])
        counts = {fate: rows for fate, rows in corpus.counts()["all"].items() if rows and fate != "train"}
        fates = ", ".join(f"{fate} {rows}" for fate, rows in counts.items())
        return Few(corpus.table("train"), f"the first rows of each source: {fates}")
