"""Turns flat metrics (`<system>/<metric>`) into tables that set the student beside the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BASIS = "student"
# JSON files are sorted by key: the order for readers is restored here.
_ORDER = ("student", "teacher", "untrained", "backbone-mean")
_SUMMARIES = ("mean/", "type/")
# Smaller is better: the search for harmful passages.
LOWER_IS_BETTER = ("accuracy@", "any_harm@")


@dataclass(frozen=True)
class Cell:
    """A system's score, and how far the student is above it (None for the student itself)."""

    score: float | int | None
    delta: float | None = None
    better: bool | None = None


@dataclass(frozen=True)
class Row:
    """One metric over all systems."""

    metric: str
    cells: list[Cell]
    summary: bool


@dataclass(frozen=True)
class Comparison:
    """Scores of several systems, and the facts that belong to none of them."""

    name: str
    systems: list[str]
    prompting: dict[str, str]
    space: dict[str, str]
    rows: list[Row]
    facts: list[tuple[str, Any]]


def compare(name: str, record: Mapping[str, Any]) -> Comparison:
    """The table of a record of `evaluate` or `probe` (keys `metrics` and `systems`)."""
    metrics = record.get("metrics")
    described = record.get("systems")
    metrics = metrics if isinstance(metrics, dict) else {}
    described = described if isinstance(described, dict) else {}
    measured = (system for system in described if any(key.startswith(f"{system}/") for key in metrics))
    systems = sorted(measured, key=lambda system: (_ORDER.index(system) if system in _ORDER else len(_ORDER), system))
    by_system = {system: _of(metrics, system) for system in systems}
    names = dict.fromkeys(metric for scores in by_system.values() for metric in scores)
    facts = [(key, value) for key, value in metrics.items() if _is_fact(key, systems)]
    return Comparison(
        name=name,
        systems=systems,
        prompting=_facts_of(described, systems, "prompting"),
        space=_facts_of(described, systems, "space"),
        rows=[_row(metric, by_system) for metric in sorted(names, key=_reading_order)],
        facts=facts,
    )


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


def _row(metric: str, by_system: Mapping[str, Mapping[str, Any]]) -> Row:
    basis = by_system.get(BASIS, {}).get(metric)
    cells = [_cell(metric, system, scores.get(metric), basis) for system, scores in by_system.items()]
    return Row(metric, cells, _is_summary(metric))


def _cell(metric: str, system: str, score: Any, basis: Any) -> Cell:
    if not isinstance(score, int | float):
        return Cell(None)
    if system == BASIS or not isinstance(basis, int | float):
        return Cell(score)
    delta = basis - score
    if not delta:
        return Cell(score, 0.0)
    return Cell(score, delta, (delta < 0) if metric.startswith(LOWER_IS_BETTER) else (delta > 0))
