"""Training curves as SVG text that follows the page's colours."""

from collections.abc import Sequence

from pipeline.report.drawing import LINE, drawn_axes, plain


def curve_svg(steps: Sequence[float], values: Sequence[float], label: str) -> str:
    """One curve over the steps: every point faintly, its running mean as the line.

    Args:
        steps: x values.
        values: y values, as many.
        label: title of the curve.
    """
    with drawn_axes(label) as (axes, result):
        axes.plot(steps, values, color=LINE, alpha=0.35, linewidth=1)
        axes.plot(steps, running_mean(values), color=LINE, linewidth=2)
        axes.set_title(plain(label), loc="left")
        axes.set_xlabel("step")
    return result[0]


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the last tenth of the curve at each point, so that it lags but never looks ahead."""
    window = max(1, len(values) // 10)
    tails = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(tail) / len(tail) for tail in tails]
