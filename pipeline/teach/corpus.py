"""Unlabeled text for the teacher: distinct texts, tokenised as the teacher does.

They are ordered by a hash: a corpus that is larger than the steps need gives an unbiased sample.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc

from pipeline.core.artifacts import Artifact
from pipeline.core.errors import TeacherError, nested_in
from pipeline.core.files import bytes_sha256
from pipeline.core.paths import TRAIN_TABLE
from pipeline.core.readers import HubSource, LocalSource
from pipeline.core.run import progress
from pipeline.core.sources import SourceDigests
from pipeline.embed.teachers.template import TemplateTokenizer, Tokens
from pipeline.teach.params import Corpus

log = logging.getLogger(__name__)

BATCH_ROWS = 4096
CHUNK = 1024  # texts tokenised at once


@dataclass(frozen=True)
class TokenizedCorpus:
    """Distinct rows in the order of the texts; the texts left out as too short, or with the tokens of another one."""

    rows: list[Tokens]
    short: int
    repeated: int


def corpus_texts(
    corpus: Corpus,
    queries: Artifact,
    responses: Artifact,
    sources: Sequence[LocalSource | HubSource],
    digests: SourceDigests,
) -> Iterator[str]:
    """The texts of the corpus; of this run's queries and responses only the training split.

    `digests` reads the sources. Raises ArtifactError or SourceError if a table or a source cannot be read.
    """
    if corpus == "sources":
        for number, source in enumerate(sources):
            with nested_in(f"sources.{number}"):
                yield from progress(digests.read(source), total=None, desc=f"read {source.label}")
    if corpus in ("queries", "both"):
        yield from queries.read(TRAIN_TABLE, ["text"])["text"].to_pylist()
    if corpus in ("responses", "both"):
        trained = queries.read(TRAIN_TABLE, ["id"])["id"].combine_chunks()
        for batch in responses.batches(["id", "response", "finish_reason"], BATCH_ROWS):
            usable = pc.and_(pc.is_in(batch["id"], trained), pc.not_equal(batch["finish_reason"], "error"))
            yield from batch.filter(usable)["response"].to_pylist()


def hash_ordered(texts: Iterable[str]) -> list[str]:
    """The distinct texts, stripped and without empty ones, ordered by the hash of each."""
    distinct = {stripped for text in texts if (stripped := text.strip())}
    return sorted(distinct, key=lambda text: bytes_sha256(text.encode("utf-8", "surrogatepass")))


def tokenize_corpus(
    texts: Sequence[str],
    tokenizer: TemplateTokenizer,
    usable: Callable[[Tokens], bool],
    *,
    most: int,
    batch_size: int,
    phase: str,
) -> TokenizedCorpus:
    """Tokenise texts in their order until there are `most` distinct usable rows.

    `usable` says whether a row has enough tokens. Raises TeacherError if there are fewer than `batch_size` such rows.
    """
    rows: dict[tuple[int, ...], Tokens] = {}
    short = repeated = 0
    starts = progress(range(0, len(texts), CHUNK), total=-(-len(texts) // CHUNK), desc=f"{phase}: tokens", unit="chunk")
    for start in starts:
        for row in tokenizer(texts[start : start + CHUNK]):
            key = tuple(row.ids)
            if not usable(row):
                short += 1
            elif key in rows:
                repeated += 1
            elif len(rows) < most:
                rows[key] = row
        if len(rows) >= most:
            break
    starts.close()
    if len(rows) < batch_size:
        raise TeacherError(
            f"{batch_size} is more than the {len(rows)} usable texts of {len(texts)} ({short} too short, {repeated} "
            "with the tokens of another): lower it or add text",
            argument="batch_size",
        )
    log.info("%s: %d texts, %d too short, %d with the tokens of another", phase, len(rows), short, repeated)
    return TokenizedCorpus(list(rows.values()), short, repeated)
