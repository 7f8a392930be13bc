"""Training curves as SVG text that follows the page's colours."""

import io
from collections.abc import Sequence

# Replaced by `currentColor` in the SVG: the page decides, light or dark.
_INK = "#010203"
_LINE = "#3b82c4"


def curve_svg(steps: Sequence[float], values: Sequence[float], label: str) -> str:
    """One curve over the steps: every point faintly, its running mean as the line.

    Args:
        steps: x values.
        values: y values, as many.
        label: title of the curve.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # A fixed salt, no date: equal curves give equal bytes.
    settings = {"svg.hashsalt": label, "svg.fonttype": "none", "font.size": 11, "text.color": _INK}
    settings |= {f"{name}.color": _INK for name in ("xtick", "ytick")} | {
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
    }
    with rc_context(settings):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.plot(steps, values, color=_LINE, alpha=0.3, linewidth=1)
        axes.plot(steps, running_mean(values), color=_LINE, linewidth=2)
        axes.set_title(label, loc="left")
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_INK, alpha=0.12)
        sink = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(sink, format="svg", transparent=True, metadata=empty)
    return _inline(sink.getvalue(), label)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the last tenth of the curve at each point, so that it lags but never looks ahead."""
    window = max(1, len(values) // 10)
    tails = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(tail) / len(tail) for tail in tails]


def _inline(svg: str, label: str) -> str:
    """The svg element alone, sized by the page."""
    body = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return body.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
