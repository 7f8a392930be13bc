"""A corpus from its sources to its splits, decided row by row without holding its texts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.collect import decontamination, near_duplicates
from pipeline.collect import rows as queries
from pipeline.collect import write as writing
from pipeline.collect.near_duplicates import NearDuplicateParams
from pipeline.collect.ngrams import WordFile, WordHasher
from pipeline.collect.spill import Mask, Rows, Staging
from pipeline.core.artifacts import ArtifactWriter
from pipeline.core.readers import HubSource, LocalSource, read_texts
from pipeline.core.run import progress
from pipeline.core.schemas import QUERIES

# Sources to staged texts: normalised, measured in characters, numbered in their order.

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
        The frame of `pipeline.collect.rows`, one row a text.

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


# What needs the text of each row that is still in: checks of it, and its words.

MEASURED_ROWS = 1024

Check = Callable[[list[str]], Mask]


def measure(
    frame: pl.DataFrame, staging: Staging, *, checks: Mapping[str, Check], words: WordFile | None = None
) -> pl.DataFrame:
    """The frame after the checks.

    Args:
        frame: of `pipeline.collect.rows`.
        staging: the texts.
        checks: by fate; each says which of some texts to leave out (bool [N]). A text that one leaves out does not meet
            the next.
        words: receives the words of the rows that stay, and is finished here.

    Raises:
        WorkError: the disk is full.
    """
    if not checks and words is None:
        return frame
    hasher = WordHasher()
    left_out: dict[str, list[Rows]] = {fate: [np.zeros(0, np.int64)] for fate in checks}
    wanted = queries.undecided(frame)
    with progress(list[str](), total=int(wanted.sum()), desc="measure") as bar:
        for rows, texts in staging.batches(wanted, MEASURED_ROWS):
            bar.update(len(rows))
            for fate, check in checks.items():
                out = check(texts.to_list())
                left_out[fate].append(rows[out])
                rows, texts = rows[~out], texts.filter(~out)
            if words is not None:
                words.append(rows, hasher(texts))
    if words is not None:
        words.finish()
    for fate, parts in left_out.items():
        frame = queries.set_fate(frame, np.concatenate(parts), fate)
    return frame


class Corpus:
    """The steps in their order: read, measure, decontaminate, drop near duplicates, sample, split, write.

    A row that one step leaves out does not take part in the next.
    """

    def __init__(self, scratch: Path, sources: Sequence[LocalSource | HubSource], *, compared: bool) -> None:
        """Nothing is read yet.

        Args:
            scratch: an empty folder for the texts.
            sources: in order.
            compared: whether rows will be compared by their words.
        """
        self._sources = sources
        self._labels = [source.label for source in sources]
        self._staging = Staging(scratch)
        self._words = WordFile(scratch / "words") if compared else None
        self._frame = queries.to_frame(0, [])
        self._removals = writing.Removals()

    def close(self) -> None:
        """Close its files."""
        if self._words is not None:
            self._words.close()

    def read(self, local_dir: Path, *, min_chars: int, max_chars: int) -> None:
        """Read the sources; rows go by their characters, or as equal to an earlier one.

        Raises:
            SourceError: a source cannot be read.
            WorkError: the disk is full.
        """
        self._frame = stage_sources(self._sources, local_dir, self._staging, min_chars=min_chars, max_chars=max_chars)

    def measure(self, checks: Mapping[str, Check]) -> None:
        """Rows go by checks of their texts, named by the fate that they give.

        Raises:
            WorkError: the disk is full.
        """
        self._frame = measure(self._frame, self._staging, checks=checks, words=self._words)

    def decontaminate(self, texts: Iterable[tuple[str, Sequence[str]]], *, ngram: int) -> int:
        """Rows go that share `ngram` words with one of the texts, which come in named batches; returns their number.

        Raises:
            EvaluationError: the texts cannot be read.
        """
        found = decontamination.find(self._compared(), texts, ngram=ngram)
        self._removals.add_contaminated(found, ngram)
        self._frame = queries.set_fate(self._frame, found.rows, "contaminated")
        return found.texts

    def drop_near_duplicates(self, params: NearDuplicateParams) -> None:
        """Rows go that nearly repeat an earlier one."""
        words = self._compared()
        found = near_duplicates.find(words, ~queries.undecided(self._frame)[words.rows], params)
        self._removals.add_near_duplicates(found, self._frame["id"])
        self._frame = queries.set_fate(self._frame, found.rows, "near_duplicate")

    def _compared(self) -> WordFile:
        if self._words is None:
            raise ValueError("a corpus whose rows are compared must be told so from the start")
        return self._words

    def sample(self, rows: int, *, seed: int, weights: Sequence[float] | None) -> None:
        """Keep `rows` rows, shared out among the sources by weight where they have one."""
        self._frame = queries.sample(self._frame, rows=rows, seed=seed, weights=weights)

    def split(self, *, heldout_fraction: float, seed: int) -> None:
        """Every row that is left gets its split."""
        self._frame = queries.split(self._frame, heldout_fraction=heldout_fraction, seed=seed)

    def counts(self) -> dict[str, dict[str, int]]:
        """Rows of each fate, in all and per source."""
        return queries.count_fates(self._frame, self._labels)

    def write(self, out: ArtifactWriter) -> None:
        """Add the table of each split, and the list of removed rows if any were looked for.

        Raises:
            ContractError: a table breaks its contract.
            WorkError: the disk is full.
        """
        out.counts = self.counts()
        for split in queries.SPLITS:
            tables = writing.split_tables(self._frame, self._staging, self._labels, split)
            out.write_stream(f"{split}.parquet", tables, QUERIES)
        if self._words is not None:
            self._removals.write(out.path / writing.REMOVED, self._frame, self._staging, self._labels)
