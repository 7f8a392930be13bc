"""A corpus from its sources to its splits; its texts stay on disk.

Rows are dropped by length or as duplicates while sources are read, then by checks of their text, by words shared with
the evaluation, and as near duplicates. Each step sees only the rows that the steps before it left. A source's
instruction is put before its texts when they are written: the steps look at the texts alone. A text under two
instructions is two queries, and no duplicate.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.collect.decontamination import find_contaminated
from pipeline.collect.near_duplicates import NearDuplicateParams, find_near_duplicates, instruction_salt
from pipeline.collect.ngrams import Hashes, TokenFile, TokenHasher
from pipeline.collect.rows import (
    SPLITS,
    count_fates,
    drop_duplicates,
    drop_lengths,
    sample,
    set_fate,
    source_labels,
    split,
    to_frame,
    undecided,
)
from pipeline.collect.spill import Mask, Rows, Spill
from pipeline.collect.write import REMOVED, Removals, split_tables
from pipeline.core.artifacts import ArtifactWriter
from pipeline.core.errors import nested_in
from pipeline.core.readers import HubSource, LocalSource
from pipeline.core.run import progress
from pipeline.core.schemas import QUERIES
from pipeline.core.sources import SourceDigests
from pipeline.core.text import normalize_text

if TYPE_CHECKING:
    from tqdm import tqdm

# Texts that are read together: at most so many rows, and about so many characters.
BATCH_ROWS = 4096
BATCH_CHARS = 4_000_000
CHECKED_ROWS = 1024  # texts that are checked together

Check = Callable[[list[str]], Mask]


class Corpus:
    """The steps of the stage in their order.

    Attributes:
        seconds: the time of each step.
        source_digests: of the sources that were read, see `Manifest.sources`.
    """

    def __init__(self, scratch: Path, sources: Sequence[LocalSource | HubSource], *, compared: bool) -> None:
        """Start with an empty folder `scratch`; `compared` says whether rows will be compared by their words."""
        self.seconds: dict[str, float] = {}
        self.source_digests: dict[str, str] = {}
        self._sources = sources
        self._labels = source_labels(sources)
        self._instructions = [normalize_text(source.instruction) for source in sources]
        self._spill = Spill(scratch)
        self._tokens = TokenFile(scratch / "words") if compared else None
        self._frame = to_frame(0, [])
        self._removals = Removals()

    def close(self) -> None:
        if self._tokens is not None:
            self._tokens.close()

    def read(self, local_dir: Path, *, min_chars: int, max_chars: int) -> None:
        """Read the sources; drop texts outside `min_chars` to `max_chars` after normalisation, and repeated ones.

        Raises SourceError if a source cannot be read. Relative paths start at `local_dir`.
        """
        with self._timed("read"):
            frames, first, digests = [to_frame(0, []).drop("text")], 0, SourceDigests(local_dir)
            for number, source in enumerate(self._sources):
                with nested_in(f"sources.{number}"):
                    rows = progress(digests.read(source), total=None, desc=f"read {source.label}")
                    for texts in _batched(rows):
                        frame = to_frame(number, texts, self._instructions[number])
                        frame = drop_lengths(frame, min_chars=min_chars, max_chars=max_chars)
                        left = np.flatnonzero(undecided(frame))
                        self._spill.add(first + left, frame["id"].gather(left), frame["text"].gather(left))
                        frames.append(frame.drop("text"))
                        first += len(texts)
            self._spill.finish()
            self.source_digests = digests.found
            self._frame = drop_duplicates(pl.concat(frames, rechunk=True))

    def check(self, checks: Mapping[str, Check]) -> None:
        """Drop texts that fail a check, and hash the tokens of the others if rows will be compared.

        `checks` by fate; each gives the texts to drop (bool [N]). A text that one drops does not reach the next.
        """
        with self._timed("measure"):
            if not checks and self._tokens is None:
                return
            hasher, chosen = TokenHasher(), undecided(self._frame)
            dropped: dict[str, list[Rows]] = {fate: [np.zeros(0, np.int64)] for fate in checks}
            with progress(list[str](), total=int(chosen.sum()), desc="measure") as bar:
                for rows, texts in self._spill.batches(chosen, CHECKED_ROWS):
                    bar.update(len(rows))
                    for fate, check in checks.items():
                        failed = check(texts.to_list())
                        dropped[fate].append(rows[failed])
                        rows, texts = rows[~failed], texts.filter(~failed)
                    if self._tokens is not None:
                        self._tokens.append(rows, hasher(texts))
            if self._tokens is not None:
                self._tokens.finish()
            for fate, parts in dropped.items():
                self._frame = set_fate(self._frame, np.concatenate(parts), fate)

    def decontaminate(self, texts: Iterable[tuple[str, Sequence[str]]], *, ngram: int) -> int:
        """Drop rows that share `ngram` words with one of the texts (named batches); returns the number of texts.

        Raises EvaluationError if the texts cannot be read.
        """
        with self._timed("decontaminate"):
            found = find_contaminated(self._compared(), texts, ngram=ngram)
            self._removals.add_contaminated(found, ngram)
            self._frame = set_fate(self._frame, found.rows, "contaminated")
            return found.texts

    def drop_near_duplicates(self, params: NearDuplicateParams) -> None:
        with self._timed("near_duplicates"):
            tokens = self._compared()
            found = find_near_duplicates(tokens, ~undecided(self._frame)[tokens.rows], params, self._salts(tokens.rows))
            self._removals.add_near_duplicates(found, self._frame["id"])
            self._frame = set_fate(self._frame, found.rows, "near_duplicate")

    def _compared(self) -> TokenFile:
        if self._tokens is None:
            raise ValueError("rows can be compared only if `compared` was set")
        return self._tokens

    def _salts(self, rows: Rows) -> Hashes | None:
        """Of the instruction of each row; None where there is none."""
        if not any(self._instructions):
            return None
        salts = np.array([instruction_salt(each) for each in self._instructions], np.uint64)
        return salts[self._frame["source"].gather(rows).to_numpy()]

    def sample(self, rows: int, *, seed: int, weights: Sequence[float] | None) -> None:
        """Keep `rows` rows, shared out among the sources by their weights, if any."""
        self._frame = sample(self._frame, rows=rows, seed=seed, weights=weights)

    def split(self, *, heldout_fraction: float, seed: int) -> None:
        self._frame = split(self._frame, heldout_fraction=heldout_fraction, seed=seed)

    def counts(self) -> dict[str, dict[str, int]]:
        """Rows of each fate, in all and per source."""
        return count_fates(self._frame, self._labels)

    def table(self, split: str) -> pa.Table:
        """The rows of one split in schema QUERIES, sorted by id, all in memory; every fate is decided."""
        return pa.concat_tables([QUERIES.empty_table(), *self._tables(split)])

    def write(self, out: ArtifactWriter) -> None:
        """Add the table of each split, and the list of removed rows if rows were compared."""
        with self._timed("write"):
            out.counts = self.counts()
            for name in SPLITS:
                rows = int((self._frame["fate"] == name).sum())
                with progress(list[str](), total=rows, desc=f"write {name}") as bar:
                    out.write_stream(f"{name}.parquet", _counted(self._tables(name), bar), QUERIES)
            if self._tokens is not None:
                self._removals.write(out.path / REMOVED, self._frame, self._spill, self._labels, self._instructions)

    def _tables(self, split: str) -> Iterator[pa.Table]:
        return split_tables(self._frame, self._spill, self._labels, self._instructions, split)

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - started, 2)


def _counted(tables: Iterable[pa.Table], bar: "tqdm[str]") -> Iterator[pa.Table]:
    for table in tables:
        yield table
        bar.update(table.num_rows)


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
