"""Content to pages. `report.j2` has the sections, `html.j2` and `markdown.j2` write their parts."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from pipeline.core.text import templates, visible
from pipeline.evaluate.comparison import Cell, Comparison
from pipeline.probe.descriptions import describe, probe_names
from pipeline.report.charts import curve_svg, forests, means_svg
from pipeline.report.content import Content
from pipeline.report.cost import total
from pipeline.report.sections import untrained_spread
from pipeline.report.verdict import Verdict

if TYPE_CHECKING:
    from jinja2 import Environment

LOSSES = {"align": "alignment loss", "recon": "reconstruction loss"}
HELDOUT = {"cosine": "held-out cosine to the target", "recon": "held-out reconstruction loss"}
_ESCAPES = {ord(char): f"\\{char}" for char in "\\`*_[]|"} | {ord("<"): "&lt;", ord(">"): "&gt;"}


def render_html(content: Content) -> str:
    """The page: one file that loads nothing else."""
    return _render(content, "html")


def render_markdown(content: Content) -> str:
    """The same facts as Markdown, without charts."""
    return _render(content, "markdown")


def _render(content: Content, format: str) -> str:
    notes = {name: note for name in probe_names() if (note := describe(name).note)}
    template = environment(format).get_template("report.j2")
    return template.render(content=content, format=format, notes=notes)


def environment(format: str, *folders: Path) -> "Environment":
    """Templates of `folders` and of the report, with the report's macros (`html.j2`, `markdown.j2`) and filters."""
    found = templates(*folders, Path(__file__).parent)
    if format == "markdown":
        found.finalize = escape_markdown
    by_name: list[Any] = [
        number,
        signed,
        interval,
        percent,
        label,
        breakable,
        seconds,
        size,
        hours,
        fence,
        total,
        curves,
    ]
    found.filters.update({function.__name__: function for function in by_name})
    found.filters.update(spread=untrained_spread, forests=charts, means=means_chart)
    return found


def curves(content: Content) -> list[Markup]:
    """Curves of the losses and held-out scores; made from numbers alone, so safe to print unescaped."""
    return [*_drawn(content.curve, LOSSES), *_drawn(content.heldout, HELDOUT)]


def _drawn(rows: Sequence[Mapping[str, float]], labels: Mapping[str, str]) -> list[Markup]:
    """A curve for each column that is a finite number in every row."""
    steps = [row["step"] for row in rows if "step" in row]
    columns = {name: [row.get(key, math.nan) for row in rows] for key, name in labels.items()}
    series = {name: [value for value in values if math.isfinite(value)] for name, values in columns.items()}
    return [Markup(curve_svg(steps, values, name)) for name, values in series.items() if len(values) == len(steps) > 0]


def charts(table: Comparison) -> list[Markup]:
    """The forest plots of a table; labels are escaped in the drawing, so safe to print unescaped."""
    return [Markup(svg) for svg in forests(table)]


def means_chart(found: Verdict) -> Markup:
    """The means of a verdict as a chart; labels are escaped in the drawing, so safe to print unescaped."""
    return Markup(means_svg(found.means, f"{found.suite}: mean over tasks"))


def number(value: Any) -> str:
    """Three decimals for a fraction, separators for a count, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def signed(value: float) -> str:
    """A difference with its sign and three decimals."""
    return f"{value:+.3f}".replace("-", "−")


def interval(entry: Cell) -> Markup:
    """The interval of a difference in brackets; empty without one."""
    if entry.low is None or entry.high is None:
        return Markup("")
    return Markup(f"[{signed(entry.low)}, {signed(entry.high)}]")


def percent(value: float | None) -> str:
    """A figure in percent with one decimal, as in papers."""
    return "–" if value is None else f"{value:.1f}".replace("-", "−")


def label(key: str) -> str:
    """A key in words: `backbone/refusal_rate_safe` becomes "backbone: refusal rate safe"."""
    return key.replace("/", ": ").replace("_", " ")


def breakable(path: str) -> Markup:
    """A path that may go on in the next line behind each slash."""
    return escape(path).replace("/", Markup("/<wbr>"))


def size(bytes: int) -> str:
    """Bytes in MB or GB (of 1000), three digits."""
    return f"{bytes / 1e9:.3g} GB" if bytes >= 1e9 else f"{bytes / 1e6:.3g} MB"


def seconds(value: float) -> str:
    """A time in its two largest units."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{value:.1f} s"


def hours(value: float) -> str:
    """GPU hours; "no GPU" for none."""
    return f"{value:.2f}" if value else "no GPU"


def fence(text: str) -> Markup:
    """Text as a Markdown code block that nothing in it ends."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return Markup(f"{ticks}yaml\n{visible(text).rstrip()}\n{ticks}")


def escape_markdown(value: Any) -> Markup:
    """Text for Markdown on one line, without markup of its own; Markup stays as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(" ".join(visible(str(value)).split()).translate(_ESCAPES))
