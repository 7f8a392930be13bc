"""The paper's figures (`published.yaml`) compared with a run's own, where both measured the same on one backbone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.core.config import Params, load
from pipeline.evaluate.comparison import Comparison

PUBLISHED_FILE = Path(__file__).with_name("published.yaml")


class Source(Params):
    """Where figures were published."""

    title: str
    arxiv: str = Field(pattern=r"^\d{4}\.\d{5}$")
    version: str | None = Field(pattern=r"^v\d+$", description="null: unknown")

    def __str__(self) -> str:
        return f"arXiv {self.arxiv}{self.version or ''}"


class Match(Params):
    """Which suite or probe measures the same.

    A suite matches a benchmark if it names it and nothing else; tasks match those that were scored; datasets match a
    probe's params. All `facts` must be in the record.
    """

    benchmark: str | None = None
    tasks: list[str] = Field(default_factory=list)
    datasets: list[str] = Field(default_factory=list)
    facts: dict[str, int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(map(bool, (self.benchmark, self.tasks, self.datasets))) != 1:
            raise ValueError("needs exactly one of benchmark, tasks, datasets")
        return self


class PublishedRow(Params):
    """A system's figures, one per column; `ours` is the system here that it is compared with."""

    system: str
    ours: str | None = None
    source: Source | None = Field(default=None, description="null: the table's")
    values: list[float | None]


class PublishedTable(Params):
    """One measurement in percent; `columns` are metrics of ours with their headings."""

    title: str
    source: Source
    match: Match
    columns: dict[str, str] = Field(min_length=1)
    lower_is_better: bool = False
    note: str = ""
    backbones: dict[str, list[PublishedRow]] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_figure_a_column(self) -> Self:
        for backbone, rows in self.backbones.items():
            for row in rows:
                if len(row.values) != len(self.columns):
                    counts = f"{len(row.values)} values for {len(self.columns)} columns"
                    raise ValueError(f"{self.title}, {backbone}, {row.system}: {counts}")
        return self


class Published(Params):
    """The whole file."""

    tables: list[PublishedTable]


@dataclass(frozen=True)
class Measured:
    """A suite or probe of this run with its entry of params.yaml."""

    comparison: Comparison
    settings: Any


@dataclass(frozen=True)
class PaperRow:
    """One row of a table; `origin` says who measured it."""

    system: str
    origin: str
    published: bool
    values: list[float | None]


@dataclass(frozen=True)
class PaperTable:
    """One published table in percent with our suite or probe `name`, each of our rows below its counterpart."""

    published: PublishedTable
    name: str
    lines: list[PaperRow]


@dataclass(frozen=True)
class PaperComparison:
    """The section of the report: the `tables` that both sides have, `backbones` with figures, their `sources`.

    `unmeasured` are titles of tables with figures for this backbone that this run did not measure.
    """

    backbone: str | None = None
    tables: list[PaperTable] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    backbones: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


def load_published(path: Path = PUBLISHED_FILE) -> Published:
    """Read the file; raises ParamsError with a line for each mistake."""
    return load(path, Published, whole_file=True)


def compare_with_paper(published: Published, backbone: str | None, measured: Sequence[Measured]) -> PaperComparison:
    """The paper's figures for `backbone` with those measured here."""
    theirs = [table for table in published.tables if backbone in table.backbones]
    pairs = [(table, own) for table in theirs for own in measured if _same(table.match, own)]
    met = {table.title for table, _ in pairs}
    return PaperComparison(
        backbone=backbone,
        tables=[
            PaperTable(table, own.comparison.name, list(_rows(table, str(backbone), own.comparison)))
            for table, own in pairs
        ],
        unmeasured=[table.title for table in theirs if table.title not in met],
        backbones=sorted({name for table in published.tables for name in table.backbones}),
        sources=list(dict.fromkeys(f"{table.source.title}, {table.source}" for table in theirs)),
    )


def _same(match: Match, own: Measured) -> bool:
    settings = own.settings if isinstance(own.settings, Mapping) else {}
    facts = dict(own.comparison.facts)
    if settings.get("languages") or any(facts.get(name) != value for name, value in match.facts.items()):
        return False
    if match.benchmark:
        return settings.get("benchmark") == match.benchmark and not (settings.get("tasks") or settings.get("local"))
    if match.tasks:
        return own.comparison.tasks == set(match.tasks)
    return any(settings.get(key) in match.datasets for key in ("dataset", "local"))


def _rows(table: PublishedTable, backbone: str, own: Comparison) -> Iterable[PaperRow]:
    for row in table.backbones[backbone]:
        yield PaperRow(row.system, f"published, {row.source or table.source}", True, row.values)
        if row.ours in own.systems:
            scores = [own.score(str(row.ours), metric) for metric in table.columns]
            values = [None if score is None else 100 * score for score in scores]
            yield PaperRow(str(row.ours), "measured here", False, values)
