"""matplotlib figures as SVG text whose colours the page decides, light or dark."""

import contextlib
import io
import re
from collections.abc import Iterator
from html import escape
from typing import Any

# Colours that no figure has by chance; in the SVG each becomes one of the page's own.
INK, LINE, GOOD, BAD, DIM = "#010203", "#010204", "#010205", "#010206", "#010207"
_OF_PAGE = {
    INK: "currentColor",
    LINE: "var(--line-ink)",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
    DIM: "var(--dim)",
}


@contextlib.contextmanager
def drawn_axes(label: str, *, width: float = 5.2, height: float = 3.2) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on; after the block the list holds the SVG.

    Args:
        label: what the chart shows, for those who cannot see it. Charts of one page need different ones.
        width: of the figure, in inches; the page scales it.
        height: of the figure, in inches.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A fixed salt, no date: equal charts give equal bytes. It also keeps the ids of two charts apart.
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
    """Text that matplotlib prints as it is."""
    return text.replace("$", r"\$")


def _inline(svg: str, label: str) -> str:
    """The svg element alone, sized and coloured by the page."""
    # Groups are numbered from 1 in every chart, and nothing refers to them: ids are unique in a page.
    body = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    for colour, of_page in _OF_PAGE.items():
        body = body.replace(colour, of_page)
    return body.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
