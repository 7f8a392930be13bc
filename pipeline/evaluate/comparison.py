"""Turns flat metrics (`<system>/<metric>`) into tables that set the student beside the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASIS = "student"
# JSON files are sorted by key: the order for readers is restored here. Other models follow by name.
_ORDER = ("student", "teacher", "untrained", "backbone-mean", "echo", "hyde")
_SUMMARIES = ("mean/", "type/")


@dataclass(frozen=True)
class Cell:
    """A system's score, and how far the student is from it.

    Attributes:
        delta: student minus this system; None for the student itself.
        low, high: ends of the interval of `delta`, where the record has one.
        verdict: about the student, as the record says; None where it says nothing.
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
class Comparison:
    """Scores of several systems, and the facts that belong to none of them."""

    name: str
    systems: list[str]
    prompting: dict[str, str]
    space: dict[str, str]
    rows: list[Row]
    facts: list[tuple[str, Any]]

    @property
    def tasks(self) -> set[str]:
        """What was scored, without the means over it."""
        return {row.metric for row in self.rows if not row.summary}

    def score(self, system: str, metric: str) -> float | int | None:
        """One system's score, None where there is none."""
        if system not in self.systems:
            return None
        at = self.systems.index(system)
        return next((row.cells[at].score for row in self.rows if row.metric == metric), None)


def compare(name: str, record: Mapping[str, Any], lower_is_better: Sequence[str] = ()) -> Comparison:
    """The table of a record of `evaluate` or `probe`.

    Args:
        name: its heading.
        record: with the keys `metrics`, `systems` and, in newer ones, `deltas`.
        lower_is_better: beginnings of the metrics that are better when smaller.
    """
    metrics, described = _mapping(record.get("metrics")), _mapping(record.get("systems"))
    measured = (system for system in described if any(key.startswith(f"{system}/") for key in metrics))
    systems = sorted(measured, key=system_order)
    by_system = {system: _of(metrics, system) for system in systems}
    names = dict.fromkeys(metric for scores in by_system.values() for metric in scores)
    deltas = _deltas(record.get("deltas"))
    lower = tuple(lower_is_better)
    return Comparison(
        name=name,
        systems=systems,
        prompting=_facts_of(described, systems, "prompting"),
        space=_facts_of(described, systems, "space"),
        rows=[_row(metric, by_system, deltas, lower) for metric in sorted(names, key=_reading_order)],
        facts=[(key, value) for key, value in metrics.items() if _is_fact(key, systems)],
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def system_order(system: str) -> tuple[int, int, str]:
    """The known ones first, `untrained-2` behind `untrained` and before `untrained-10`, then by name."""
    base, _, seed = system.rpartition("-")
    if base in _ORDER and seed.isdigit():
        return _ORDER.index(base), int(seed) + 1, system
    return (_ORDER.index(system) if system in _ORDER else len(_ORDER)), 0, system


def _is_fact(key: str, systems: list[str]) -> bool:
    """Neither a system's score nor derived from other systems' scores."""
    first, _, rest = key.partition("/")
    return first not in {*systems, "delta"} and (first != "reduction" or rest.startswith(f"{BASIS}/"))


def _of(metrics: Mapping[str, Any], system: str) -> dict[str, Any]:
    start = f"{system}/"
    return {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}


def _facts_of(described: Mapping[str, Any], systems: list[str], key: str) -> dict[str, str]:
    entries = {system: described[system] for system in systems if isinstance(described[system], dict)}
    return {system: str(entry[key]) for system, entry in entries.items() if key in entry}


def _is_summary(metric: str) -> bool:
    return metric.startswith(_SUMMARIES)


def _reading_order(metric: str) -> tuple[bool, str, int]:
    """Tasks before their means, and `@5` before `@20`."""
    name, _, k = metric.partition("@")
    return _is_summary(metric), name, int(k) if k.isdigit() else 0


Deltas = Mapping[tuple[str, str], Mapping[str, Any]]


def _deltas(recorded: Any) -> Deltas | None:
    """What a record says about each metric and system; None where it is older than intervals."""
    if not isinstance(recorded, list):
        return None
    return {
        (str(entry.get("metric")), str(entry.get("system"))): entry for entry in recorded if isinstance(entry, dict)
    }


def _row(metric: str, by_system: Mapping[str, Mapping[str, Any]], deltas: Deltas | None, lower: tuple[str, ...]) -> Row:
    basis = by_system.get(BASIS, {}).get(metric)
    cells = [
        _cell(scores.get(metric), _recorded(deltas, metric, system, basis, scores.get(metric)))
        for system, scores in by_system.items()
    ]
    return Row(metric, cells, _is_summary(metric), bool(lower) and metric.startswith(lower))


def _recorded(deltas: Deltas | None, metric: str, system: str, basis: Any, score: Any) -> Mapping[str, Any]:
    """What is known of the difference: in an older record the bare one, else what the record holds.

    A record with deltas has none where the scores are not comparable, e.g. cosines of two spaces.
    """
    if deltas is not None:
        return deltas.get((metric, system), {})
    comparable = system != BASIS and _number(basis) is not None and _number(score) is not None
    return {"delta": basis - score} if comparable else {}


def _cell(score: Any, recorded: Mapping[str, Any]) -> Cell:
    if _number(score) is None:
        return Cell(None)
    verdict = recorded.get("verdict")
    return Cell(
        score=score,
        delta=_number(recorded.get("delta")),
        low=_number(recorded.get("low")),
        high=_number(recorded.get("high")),
        verdict=str(verdict) if verdict else None,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
