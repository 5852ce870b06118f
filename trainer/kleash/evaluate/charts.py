"""Small charts as inline SVG that take the page's text colour: they read on light and dark."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

INK = "#010203"
"""Stand-in for the page's text colour; no palette uses it, so replacing it is safe."""

COLORS = ("#2f7ed8", "#d9822b", "#2e9e6b", "#b0508e")
"""Blue, orange, green, plum: told apart in greyscale by their dashes."""

DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(title: str, lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """An SVG element with the curves, titled for screen readers."""
    return _svg(title, lambda axes: _draw_lines(axes, lines, x_label, y_label))


def calibration_chart(title: str, predicted: Sequence[float], observed: Sequence[float]) -> str:
    """Observed preference frequency against the predicted one, with the diagonal."""

    def draw(axes):
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        axes.plot(predicted, observed, color=COLORS[0], marker="o", markersize=4)
        axes.set_xlabel("predicted P(preferred)")
        axes.set_ylabel("observed")

    return _svg(title, draw)


def _draw_lines(axes, lines: Sequence[Line], x_label: str, y_label: str) -> None:
    for index, line in enumerate(lines):
        axes.plot(
            line.x,
            line.y,
            label=line.label,
            color=COLORS[index % 4],
            linestyle=DASHES[index % 4],
            linewidth=1.6,
            marker="o" if len(line.x) < 20 else None,
            markersize=3,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _svg(title: str, draw) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": title,
            "font.size": 9,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    ):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
