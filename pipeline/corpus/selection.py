"""A corpus from its sources to its splits, decided row by row without holding its texts."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline import queries
from pipeline.artifacts import ArtifactWriter
from pipeline.contracts import QUERIES
from pipeline.corpus import decontamination, near_duplicates, writing
from pipeline.corpus.measuring import Check, measure
from pipeline.corpus.near_duplicates import NearDuplicateParams
from pipeline.corpus.reading import stage_sources
from pipeline.corpus.staging import Staging
from pipeline.corpus.words import WordFile
from pipeline.sources import HubSource, LocalSource


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
