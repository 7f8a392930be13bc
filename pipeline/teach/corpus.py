"""Unlabeled text for the teacher: distinct texts in an order of their own, read as the teacher reads them.

The order is that of a hash of the text: it depends on no file order, and a corpus that is larger than what the steps
read gives an unbiased part of itself.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.artifacts import Artifact, bytes_sha256
from pipeline.core.errors import TeacherError
from pipeline.core.paths import TRAIN_TABLE
from pipeline.core.readers import HubSource, LocalSource, read_texts
from pipeline.core.run import progress
from pipeline.embed.teachers.template import Reader, Tokens
from pipeline.teach.params import Corpus

log = logging.getLogger(__name__)

BATCH_ROWS = 4096
# Texts tokenised at once.
CHUNK = 1024


@dataclass(frozen=True)
class Read:
    """Distinct rows of tokens.

    Attributes:
        rows: in the order of the texts.
        short: texts that are left out because they have too few tokens.
        repeated: texts that are left out because another one reads the same, up to the limit of tokens.
    """

    rows: list[Tokens]
    short: int
    repeated: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.ids) for row in self.rows]


def corpus_texts(
    corpus: Corpus, queries: Artifact, responses: Artifact, sources: Sequence[LocalSource | HubSource], local_dir: Path
) -> Iterator[str]:
    """The texts that the params name; of this run's, those of training queries only.

    Raises:
        ArtifactError: a table is damaged.
        SourceError: a source cannot be read.
    """
    if corpus == "sources":
        for source in sources:
            yield from progress(read_texts(source, local_dir), total=None, desc=f"read {source.label}")
    if corpus in ("queries", "both"):
        yield from queries.read(TRAIN_TABLE, ["text"])["text"].to_pylist()
    if corpus in ("responses", "both"):
        yield from _answers(queries, responses)


def _answers(queries: Artifact, responses: Artifact) -> Iterator[str]:
    trained = set(queries.read(TRAIN_TABLE, ["id"])["id"].to_pylist())
    columns = ["id", "response", "finish_reason"]
    for batch in responses.batches(columns, BATCH_ROWS):
        for row_id, text, finish in zip(*(batch[name].to_pylist() for name in columns), strict=True):
            if finish != "error" and row_id in trained:
                yield text


def in_order(texts: Iterable[str]) -> list[str]:
    """The distinct texts without the space around them and without empty ones, ordered by a hash of each."""
    distinct = {stripped for text in texts if (stripped := text.strip())}
    return sorted(distinct, key=lambda text: bytes_sha256(text.encode("utf-8", "surrogatepass")))


def read_corpus(
    texts: Sequence[str], reader: Reader, usable: Callable[[Tokens], bool], *, at_most: int, batch_size: int, phase: str
) -> Read:
    """Tokenise texts until there are as many distinct rows as the steps read.

    Args:
        texts: see `in_order`.
        reader: of the teacher, with the limit of the phase.
        usable: whether a row has tokens enough.
        at_most: rows that are wanted.
        batch_size: rows that are needed.
        phase: whose params are named in messages.

    Raises:
        TeacherError: there are fewer usable rows than a batch holds.
    """
    rows: dict[tuple[int, ...], Tokens] = {}
    short = repeated = 0
    starts = progress(range(0, len(texts), CHUNK), total=-(-len(texts) // CHUNK), desc=f"{phase}: tokens", unit="chunk")
    for start in starts:
        for row in reader(texts[start : start + CHUNK]):
            key = tuple(row.ids)
            if not usable(row):
                short += 1
            elif key in rows:
                repeated += 1
            elif len(rows) < at_most:
                rows[key] = row
        if len(rows) >= at_most:
            break
    starts.close()
    if len(rows) < batch_size:
        raise TeacherError(
            f"teach.corpus: {len(rows)} of its {len(texts)} texts are usable ({short} have too few tokens, {repeated} "
            f"read like another), teach.{phase}.batch_size is {batch_size}: lower it or add text"
        )
    log.info("%s: %d texts, %d too short, %d that read like another", phase, len(rows), short, repeated)
    return Read(list(rows.values()), short, repeated)
