"""Content to pages."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipeline.core.text import templates, visible
from pipeline.evaluate.comparison import Cell, Comparison
from pipeline.probe.descriptions import describe, probe_names
from pipeline.report.charts import curve_svg, forests
from pipeline.report.content import Content
from pipeline.report.cost import totals
from pipeline.report.sections import untrained_spread

if TYPE_CHECKING:
    from jinja2 import Environment

LOSSES = {"align": "alignment loss", "recon": "reconstruction loss"}
HELDOUT = {"cosine": "held-out cosine to the target", "recon": "held-out reconstruction loss"}


def render_html(content: Content) -> str:
    """The page: one file, no other asset."""
    environment = _environment(autoescape=True)
    return environment.get_template("report.html.j2").render(content=content, curves=_curves(content))


def render_markdown(content: Content) -> str:
    """The same facts as Markdown, without curves."""
    return _environment(autoescape=False).get_template("report.md.j2").render(content=content)


def _environment(*, autoescape: bool) -> "Environment":
    environment = templates(Path(__file__).parent, autoescape=autoescape)
    filters: dict[str, Any] = {
        "number": number,
        "signed": signed,
        "interval": interval,
        "percent": percent,
        "label": label,
        "seconds": seconds,
        "cell": cell,
        "spread": untrained_spread,
        "totals": totals,
        "forests": charts,
        "hours": hours,
        "fence": fence,
    }
    environment.filters.update(filters)
    environment.globals["notes"] = {name: note for name in probe_names() if (note := describe(name).note)}
    return environment


def _curves(content: Content) -> list[Markup]:
    """Curves of the losses and held-out scores; made here from numbers alone, so safe to print unescaped."""
    return [*_drawn(content.curve, LOSSES), *_drawn(content.heldout, HELDOUT)]


def _drawn(rows: Sequence[Mapping[str, float]], labels: Mapping[str, str]) -> list[Markup]:
    """One curve for each column that every row has, and that is a number throughout."""
    steps = [row["step"] for row in rows if "step" in row]
    columns = {name: [row.get(key, math.nan) for row in rows] for key, name in labels.items()}
    series = {name: [value for value in values if math.isfinite(value)] for name, values in columns.items()}
    return [Markup(curve_svg(steps, values, name)) for name, values in series.items() if len(values) == len(steps) > 0]


def charts(table: Comparison) -> list[Markup]:
    """The forest plots of a table; labels are escaped where they are drawn, so safe to print unescaped."""
    return [Markup(svg) for svg in forests(table)]


def number(value: Any) -> str:
    """Three decimals for a fraction, thousands for a count, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def signed(value: float) -> str:
    """A difference, its sign always shown."""
    return f"{value:+.3f}".replace("-", "−")


def interval(entry: Cell) -> str:
    """The interval of a difference in brackets, nothing where there is none."""
    if entry.low is None or entry.high is None:
        return ""
    return f"[{signed(entry.low)}, {signed(entry.high)}]"


def percent(value: float | None) -> str:
    """A figure in percent as papers print it."""
    return "–" if value is None else f"{value:.1f}".replace("-", "−")


def label(key: str) -> str:
    """A flat key in words: `backbone/refusal_rate_safe` is "backbone: refusal rate safe"."""
    return key.replace("/", ": ").replace("_", " ")


def seconds(value: float) -> str:
    """A duration for people."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{value:.1f} s"


def hours(value: float) -> str:
    """GPU hours; "no GPU" for none."""
    return f"{value:.2f}" if value else "no GPU"


def fence(text: str) -> str:
    """Text as a Markdown code block that nothing in it ends."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}yaml\n{visible(text).rstrip()}\n{ticks}"


def cell(value: Any) -> str:
    """Text for a Markdown table: one line, no pipes, no markup."""
    line = " ".join(visible(str(value)).split())
    for char in "\\`*_[]|<>":
        line = line.replace(char, f"\\{char}" if char not in "<>" else {"<": "&lt;", ">": "&gt;"}[char])
    return line
