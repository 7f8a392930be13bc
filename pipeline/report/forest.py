"""Student minus each other system, with its interval, a line a task: forest plots."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.drawing import BAD, DIM, GOOD, INK, drawn_axes, plain
from pipeline.report.tables import Comparison

# With more tasks than this, the means by category are drawn alone.
MOST_TASKS = 16
LONGEST_NAME = 28
# By verdict: colour, marker, and whether the marker is filled; so that no reader depends on colour.
_STYLES = {"better": (GOOD, "^", True), "worse": (BAD, "v", True)}
_NOISE = (DIM, "o", False)


@dataclass(frozen=True)
class Line:
    """A difference: of which metric, how large, between which ends, and the record's verdict."""

    metric: str
    delta: float
    low: float
    high: float
    verdict: str | None


def forest_lines(table: Comparison, system: str) -> list[Line]:
    """The differences of a table to one system that have an interval, in the table's order."""
    at = table.systems.index(system)
    few = len(table.tasks) <= MOST_TASKS
    cells = [(row, row.cells[at]) for row in table.rows if few or row.summary]
    return [
        Line(row.metric + (" ↓" if row.lower_is_better else ""), cell.delta, cell.low, cell.high, cell.verdict)
        for row, cell in cells
        if cell.delta is not None and cell.low is not None and cell.high is not None
    ]


def forests(table: Comparison) -> list[str]:
    """A chart for each system that the table has intervals for, all on the same scale."""
    lines = {system: found for system in table.systems if (found := forest_lines(table, system))}
    ends = [end for found in lines.values() for line in found for end in (line.low, line.high, 0.0)]
    margin = 0.06 * (max(ends) - min(ends)) if ends else 0.0
    scale = (min(ends) - margin, max(ends) + margin) if margin else (-1.0, 1.0)
    return [forest_svg(found, f"{table.name}: student minus {system}", scale) for system, found in lines.items()]


def forest_svg(lines: Sequence[Line], label: str, scale: tuple[float, float]) -> str:
    """One forest plot.

    Args:
        lines: from top to bottom.
        label: title of the chart.
        scale: ends of the x axis.
    """
    with drawn_axes(label, height=0.95 + 0.3 * len(lines)) as (axes, result):
        for place, line in enumerate(lines):
            colour, marker, filled = _STYLES.get(line.verdict or "", _NOISE)
            axes.hlines(place, line.low, line.high, color=colour, linewidth=2)
            fill = colour if filled else "none"
            axes.plot([line.delta], [place], marker=marker, color=colour, markerfacecolor=fill, markersize=7)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(lines)), [plain(_shortened(line.metric)) for line in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xlim(*scale)
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(plain(label), loc="left", x=0, fontsize=11)
    return result[0]


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
