"""Training curves and forest plots as SVG text, drawn by matplotlib in the page's own colours, light or dark."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import fill
from typing import Any

from pipeline.evaluate.comparison import Comparison
from pipeline.report.verdict import MeanScore

# Placeholder colours; in the SVG each becomes a colour of the page.
INK, LINE, GOOD, BAD, DIM = "#010203", "#010204", "#010205", "#010206", "#010207"
_PAGE_COLOURS = {
    INK: "currentColor",
    LINE: "var(--line-ink)",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
    DIM: "var(--dim)",
}
# With more tasks than this, only the means by category are drawn.
MOST_TASKS = 16
LONGEST_NAME = 28
# Characters that fit beside one another in a title.
TITLE_LINE = 52
# By verdict: colour, marker, filled or not, so that no reader depends on colour.
_STYLES = {"better": (GOOD, "^", True), "worse": (BAD, "v", True)}
_NOISE = (DIM, "o", False)


@contextlib.contextmanager
def drawn_axes(label: str, *, width: float = 5.2, height: float = 3.2) -> Iterator[tuple[Any, list[str]]]:
    """Axes of some inches to draw on; after the block the list holds the SVG. Labels are unique on a page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A fixed salt and no date: equal charts give equal bytes, and the ids of two charts differ.
    settings: dict[str, Any] = {"svg.hashsalt": label, "svg.fonttype": "none", "font.size": 11, "text.color": INK}
    settings |= dict.fromkeys(("xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor"), INK)
    with rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes, result = figure.add_subplot(), list[str]()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.12)
        yield axes, result
        sink = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(sink, format="svg", transparent=True, metadata=empty)
    result.append(_inline(sink.getvalue(), label))


def plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def _inline(svg: str, label: str) -> str:
    """The svg element alone, sized and coloured by the page."""
    # Every chart numbers its groups from 1 and nothing refers to them: without these, ids are unique in a page.
    body = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    for colour, page_colour in _PAGE_COLOURS.items():
        body = body.replace(colour, page_colour)
    return body.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def curve_svg(steps: Sequence[float], values: Sequence[float], label: str) -> str:
    """A curve of values over steps: the points faintly, their running mean as the line."""
    with drawn_axes(label) as (axes, result):
        axes.plot(steps, values, color=LINE, alpha=0.35, linewidth=1)
        axes.plot(steps, running_mean(values), color=LINE, linewidth=2)
        axes.set_title(plain(label), loc="left")
        axes.set_xlabel("step")
    return result[0]


def running_mean(values: Sequence[float]) -> list[float]:
    """At each point the mean over the last tenth of the curve, so it never looks ahead."""
    window = max(1, len(values) // 10)
    tails = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(tail) / len(tail) for tail in tails]


@dataclass(frozen=True)
class ForestLine:
    """A difference of one metric with its interval and verdict."""

    metric: str
    delta: float
    low: float
    high: float
    verdict: str | None


def forest_lines(table: Comparison, system: str) -> list[ForestLine]:
    """The differences to one system that have an interval, in the table's order."""
    at = table.systems.index(system)
    few = len(table.tasks) <= MOST_TASKS
    cells = [(row, row.cells[at]) for row in table.rows if few or row.summary]
    return [
        ForestLine(row.metric + (" ↓" if row.lower_is_better else ""), cell.delta, cell.low, cell.high, cell.verdict)
        for row, cell in cells
        if cell.delta is not None and cell.low is not None and cell.high is not None
    ]


def forests(table: Comparison) -> list[str]:
    """A chart for each system with intervals, all on the same scale."""
    lines = {system: found for system in table.systems if (found := forest_lines(table, system))}
    ends = [end for found in lines.values() for line in found for end in (line.low, line.high, 0.0)]
    margin = 0.06 * (max(ends) - min(ends)) if ends else 0.0
    scale = (min(ends) - margin, max(ends) + margin) if margin else (-1.0, 1.0)
    return [forest_svg(found, f"{table.name}: student minus {system}", scale) for system, found in lines.items()]


def forest_svg(lines: Sequence[ForestLine], label: str, scale: tuple[float, float]) -> str:
    """One forest plot, its lines from top to bottom; `scale` has the ends of the x axis."""
    with drawn_axes(label, height=0.95 + 0.3 * len(lines)) as (axes, result):
        for position, line in enumerate(lines):
            colour, marker, filled = _STYLES.get(line.verdict or "", _NOISE)
            axes.hlines(position, line.low, line.high, color=colour, linewidth=2)
            fill = colour if filled else "none"
            axes.plot([line.delta], [position], marker=marker, color=colour, markerfacecolor=fill, markersize=7)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(lines)), [plain(_shortened(line.metric)) for line in lines])
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xlim(*scale)
        axes.locator_params(axis="x", nbins=5)
        _set_title(axes, label)
    return result[0]


def _set_title(axes: Any, label: str) -> None:
    """A title from the left edge of the chart, not of its axes: names of systems are long."""
    axes.figure.suptitle(plain(fill(label, TITLE_LINE)), x=0.01, ha="left", fontsize=11)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def means_svg(means: Sequence[MeanScore], label: str) -> str:
    """The means of some systems under one another; the first is the student, whose mean is a line through all."""
    with drawn_axes(label, height=0.95 + 0.4 * len(means)) as (axes, result):
        axes.axvline(means[0].mean, color=INK, linewidth=1)
        for position, found in enumerate(means):
            colour, marker, filled = _STYLES.get(found.verdict or "", _NOISE) if position else (LINE, "s", True)
            if found.low is not None and found.high is not None:
                axes.hlines(position, found.low, found.high, color=colour, linewidth=2)
            fill = colour if filled else "none"
            axes.plot([found.mean], [position], marker=marker, color=colour, markerfacecolor=fill, markersize=8)
        axes.set_yticks(range(len(means)), [plain(_shortened(found.system)) for found in means])
        axes.set_ylim(len(means) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=5)
        _set_title(axes, label)
    return result[0]
