"""What each compared system is and reads, gathered from all records; and how far random starts lie apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pipeline.report.tables import Comparison, Row, system_order


@dataclass(frozen=True)
class SystemFacts:
    """A system, the model behind it, and what it reads besides the text."""

    name: str
    model: str
    prompting: str


def system_facts(known: Sequence[SystemFacts], comparison: Comparison, record: Mapping[str, Any]) -> list[SystemFacts]:
    """`known` and the systems of a further record, in reading order; what was said first stays."""
    found = {facts.name: facts for facts in known}
    for name in comparison.systems:
        before = found.get(name, SystemFacts(name, "", ""))
        model, prompting = _model(record["systems"][name]), comparison.prompting.get(name, "")
        found[name] = SystemFacts(name, before.model or model, before.prompting or prompting)
    return [found[name] for name in sorted(found, key=system_order)]


def _model(described: Any) -> str:
    """A system's own model, else the names of those that it is made of."""
    identity = described.get("identity") if isinstance(described, dict) else None
    if not isinstance(identity, dict):
        return ""
    if isinstance(identity.get("name"), str):
        return str(identity["name"])
    inner = (part["name"] for part in identity.values() if isinstance(part, dict) and isinstance(part.get("name"), str))
    return ", ".join(dict.fromkeys(inner))


@dataclass(frozen=True)
class Spread:
    """One metric of the untrained student over its random starts."""

    metric: str
    seeds: int
    mean: float
    deviation: float


def untrained_spread(comparison: Comparison) -> list[Spread]:
    """Mean and standard deviation (n - 1) over `untrained` and `untrained-<seed>`, nothing for a single seed.

    Of the means where the table has some, else of every metric.
    """
    at = [index for index, name in enumerate(comparison.systems) if _is_untrained(name)]
    summaries = [row for row in comparison.rows if row.summary]
    return [spread for row in summaries or comparison.rows if (spread := _spread(row, at))]


def _is_untrained(name: str) -> bool:
    base, _, seed = name.partition("-")
    return base == "untrained" and (not seed or seed.isdigit())


def _spread(row: Row, at: Sequence[int]) -> Spread | None:
    scores = [score for index in at if (score := row.cells[index].score) is not None]
    return Spread(row.metric, len(scores), fmean(scores), stdev(scores)) if len(scores) > 1 else None
