"""Turns flat metrics (`<system>/<metric>`) into tables of the student and the systems it is compared with."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.evaluate.registry import is_reading, system_order

BASIS, START = "student", "start"
_SUMMARIES = ("mean/", "type/")


@dataclass(frozen=True)
class Cell:
    """A system's score, and the student's difference to it (None: not compared, or the student itself).

    `delta` is student minus this system, `low` to `high` its interval, `verdict` is about the student.
    """

    score: float | int | None
    delta: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Row:
    """One metric over all systems."""

    metric: str
    cells: list[Cell]
    summary: bool
    lower_is_better: bool


@dataclass(frozen=True)
class Gain:
    """A mean of the student beside the best untrained reading, by name, and the student's own start."""

    metric: str
    student: float | int
    reading: str
    over_reading: Cell
    over_start: Cell | None

    @property
    def sentence(self) -> str:
        """In words, for one line."""
        text = (
            f"{self.metric}: the student has {self.student:.3f}, the best untrained reading ({self.reading}) "
            f"{self.over_reading.score:.3f}"
        )
        if self.over_reading.delta is not None:
            text += f": training added {_difference(self.over_reading)}"
        if self.over_start is not None and self.over_start.delta is not None:
            text += f"; over its own start {_difference(self.over_start)}"
        return text


@dataclass(frozen=True)
class StoredForm:
    """The student's embeddings as an index stores them; `cells` have this form minus the whole student, by metric.

    `stored` is float32, int8 or binary, `bytes` those of a million vectors.
    """

    stored: str
    dimensions: int
    bytes: int
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Comparison:
    """Scores of several systems, and the facts that belong to none of them."""

    name: str
    systems: list[str]
    prompting: dict[str, str]
    space: dict[str, str]
    rows: list[Row]
    facts: list[tuple[str, Any]]
    stored: list[StoredForm] = field(default_factory=list)

    @property
    def tasks(self) -> set[str]:
        """Metrics without the means over them."""
        return {row.metric for row in self.rows if not row.summary}

    @property
    def gains(self) -> "list[Gain]":
        """What training added to each mean: the student against the untrained reading that scores best there."""
        return [gain for row in self.rows if row.summary and (gain := self._gain(row)) is not None]

    def _gain(self, row: Row) -> "Gain | None":
        cells = dict(zip(self.systems, row.cells, strict=True))
        student, best = cells.get(BASIS), best_reading(cells)
        if student is None or student.score is None or best is None:
            return None
        return Gain(row.metric, student.score, best, cells[best], cells.get(START))

    def score(self, system: str, metric: str) -> float | int | None:
        cells = next((row.cells for row in self.rows if row.metric == metric), [])
        return next((cell.score for name, cell in zip(self.systems, cells, strict=False) if name == system), None)


def best_reading(cells: Mapping[str, Cell]) -> str | None:
    """The untrained reading with the largest score in the cells of a row, by system; None without any."""
    scores = {name: cell.score for name, cell in cells.items() if is_reading(name) and cell.score is not None}
    return max(scores, key=lambda name: scores[name], default=None)


def _difference(cell: Cell) -> str:
    between = "" if cell.low is None or cell.high is None else f" [{cell.low:+.3f}, {cell.high:+.3f}]"
    return f"{cell.delta:+.3f}{between}{f', {cell.verdict}' if cell.verdict else ''}"


def compare(name: str, record: Mapping[str, Any], lower_is_better: Sequence[str] = ()) -> Comparison:
    """The table of a record of `evaluate` or `probe`; metrics that begin with `lower_is_better` are better lower."""
    metrics, described = _mapping(record.get("metrics")), _mapping(record.get("systems"))
    scores = {system: metrics_of(system, metrics) for system in sorted(described, key=system_order)}
    scores = {system: found for system, found in scores.items() if found}
    names = {metric for found in scores.values() for metric in found}
    deltas = _deltas(record.get("deltas"))
    return Comparison(
        name=name,
        systems=list(scores),
        prompting=_facts_of(described, scores, "prompting"),
        space=_facts_of(described, scores, "space"),
        rows=[_row(metric, scores, deltas, tuple(lower_is_better)) for metric in sorted(names, key=_reading_order)],
        facts=[(key, value) for key, value in metrics.items() if _is_fact(key, scores)],
        stored=[_stored_form(_mapping(entry)) for entry in record.get("stored") or []],
    )


def _stored_form(entry: Mapping[str, Any]) -> StoredForm:
    deltas = {str(delta["metric"]): delta for delta in entry["deltas"]}
    scores = entry["scores"]
    cells = {metric: _cell(scores[metric], deltas.get(metric, {})) for metric in sorted(scores, key=_reading_order)}
    return StoredForm(str(entry["stored"]), int(entry["dimensions"]), int(entry["bytes_per_million"]), cells)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_fact(key: str, systems: Collection[str]) -> bool:
    first, _, rest = key.partition("/")
    return first not in {*systems, "delta"} and (first != "reduction" or rest.startswith(f"{BASIS}/"))


def metrics_of(system: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A system's part of flat metrics, without its name in the keys."""
    start = f"{system}/"
    return {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}


def _facts_of(described: Mapping[str, Any], systems: Collection[str], key: str) -> dict[str, str]:
    entries = {system: _mapping(described[system]) for system in systems}
    return {system: str(entry[key]) for system, entry in entries.items() if key in entry}


def _reading_order(metric: str) -> tuple[bool, str, int]:
    """Tasks before their means, and `@5` before `@20`."""
    name, _, k = metric.partition("@")
    return metric.startswith(_SUMMARIES), name, int(k) if k.isdigit() else 0


Deltas = Mapping[tuple[str, str], Mapping[str, Any]]


def _deltas(recorded: Any) -> Deltas | None:
    """The record's entries by metric and system; None in a record that is older than intervals."""
    if not isinstance(recorded, list):
        return None
    return {
        (str(entry.get("metric")), str(entry.get("system"))): entry for entry in recorded if isinstance(entry, dict)
    }


def _row(metric: str, scores: Mapping[str, Mapping[str, Any]], deltas: Deltas | None, lower: tuple[str, ...]) -> Row:
    basis = _number(scores.get(BASIS, {}).get(metric))
    cells = []
    for system, found in scores.items():
        if (score := _number(found.get(metric))) is None:
            cells.append(Cell(None))
        elif deltas is not None:  # without an entry the scores are not comparable, e.g. cosines of two spaces
            cells.append(_cell(found[metric], deltas.get((metric, system), {})))
        else:
            cells.append(Cell(found[metric], None if basis is None or system == BASIS else basis - score))
    return Row(metric, cells, metric.startswith(_SUMMARIES), bool(lower) and metric.startswith(lower))


def _cell(score: Any, delta: Mapping[str, Any]) -> Cell:
    verdict = delta.get("verdict")
    value, low, high = (_number(delta.get(key)) for key in ("delta", "low", "high"))
    return Cell(score, value, low, high, str(verdict) if verdict else None)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
