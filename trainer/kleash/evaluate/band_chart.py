"""Line charts with bands as inline SVG; colours are classes, so that the page's theme decides.

Coordinates are those of a view box of WIDTH x HEIGHT; the page's script moves a cursor in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from kleash.evaluate.run_groups import Point

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 34
NUM_STYLES = 6
"""Colours and dashes of the page; later lines begin again."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2")
NUM_TICKS = 4
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Line:
    """One curve with its band."""

    label: str
    style: int
    """Colour and dash; the same for one group in every chart."""
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """A range of values along a length of the view box."""

    low: float
    high: float
    start: float
    """Coordinate of ``low``."""
    end: float

    def at(self, value: float) -> float:
        """Coordinate of a value, to a tenth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values inside of the range."""
        step = nice_step((self.high - self.low) / NUM_TICKS)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [round((first + index) * step, 10) for index in range(count)]


def nice_step(size: float) -> float:
    """The next 1, 2 or 5 times a power of ten. Example: 0.13 gives 0.2."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9)) * power


def axes(lines: Sequence[Line]) -> tuple[Axis, Axis]:
    """x and y for all points with their bands, with room where everything has one value."""
    points = [point for line in lines for point in line.points]
    left, right = min(point.step for point in points), max(point.step for point in points)
    low, high = min(point.low for point in points), max(point.high for point in points)
    if left == right:
        left, right = left - 0.5, right + 0.5
    if low == high:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    room = 0.05 * (high - low)
    return (
        Axis(left, right, LEFT, WIDTH - RIGHT),
        Axis(low - room, high + room, HEIGHT - BOTTOM, TOP),
    )


def chart_svg(title: str, lines: Sequence[Line], *, x_label: str, y_label: str) -> Markup:
    """An SVG element that says in its label what the curves do."""
    x, y = axes(lines)
    inside = "".join([*_grid(x, y), *_axis_labels(x_label, y_label)])
    inside += "".join(_band(line, x, y) for line in lines)
    inside += "".join(_curve(line, x, y) for line in lines)
    label = escape(f"{title}. {' '.join(describe(line) for line in lines)}")
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'{inside}<g class="cursor" hidden></g></svg>'
    )


def describe(line: Line) -> str:
    """A sentence for those who do not see the curve."""
    first, last = line.points[0], line.points[-1]
    ends = f"{number(first.mean)} at {number(first.step)}"
    if len(line.points) > 1:
        ends = f"from {ends} to {number(last.mean)} at {number(last.step)}"
    return f"{line.label}: {ends}."


def cursor_data(lines: Sequence[Line]) -> dict[str, Any]:
    """What the page's script needs to move a cursor: coordinates and texts of every point."""
    x, y = axes(lines)
    return {
        "lines": [
            {
                "label": line.label,
                "style": line.style % NUM_STYLES,
                "points": [
                    [x.at(p.step), y.at(p.mean), number(p.step), number(p.mean), _range(p)]
                    for p in line.points
                ],
            }
            for line in lines
        ],
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
    }


def number(value: float) -> str:
    """Four digits, without an exponent where it can be avoided."""
    is_whole = math.isfinite(value) and value == int(value) and abs(value) < 1e6
    text = str(int(value)) if is_whole else f"{value:.4g}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("-", MINUS)


def short_number(value: float) -> str:
    """Three digits, and 0 for what is smaller than any figure of a run that matters."""
    return number(float(f"{value:.3g}")) if abs(value) >= 5e-5 else "0"


def _range(point: Point) -> str:
    return "" if point.low == point.high else f"{number(point.low)} to {number(point.high)}"


def _grid(x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5}" class="end">{number(value)}</text>')
    for value in x.ticks():
        at = x.at(value)
        parts.append(f'<path class="tick" d="M{at} {HEIGHT - BOTTOM}v4"/>')
        place = f'x="{at}" y="{HEIGHT - BOTTOM + 16}" class="middle"'
        parts.append(f"<text {place}>{number(value)}</text>")
    parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    return parts


def _axis_labels(x_label: str, y_label: str) -> list[str]:
    middle = (LEFT + WIDTH - RIGHT) / 2
    height = (TOP + HEIGHT - BOTTOM) / 2
    return [
        f'<text x="{middle}" y="{HEIGHT - 4}" class="middle label">{escape(x_label)}</text>',
        f'<text transform="translate(11 {height}) rotate(-90)" class="middle label">'
        f"{escape(y_label)}</text>",
    ]


def _band(line: Line, x: Axis, y: Axis) -> str:
    if all(point.low == point.high for point in line.points):
        return ""
    upper = [f"{x.at(point.step)} {y.at(point.high)}" for point in line.points]
    lower = [f"{x.at(point.step)} {y.at(point.low)}" for point in reversed(line.points)]
    return f'<path class="band c{line.style % NUM_STYLES}" d="M{"L".join(upper + lower)}Z"/>'


def _curve(line: Line, x: Axis, y: Axis) -> str:
    style = line.style % NUM_STYLES
    places = [(x.at(point.step), y.at(point.mean)) for point in line.points]
    path = "L".join(f"{left} {top}" for left, top in places)
    dash = f' stroke-dasharray="{DASHES[style]}"' if DASHES[style] else ""
    dots = ""
    if len(places) <= 12:
        dots = "".join(
            f'<circle class="dot c{style}" cx="{left}" cy="{top}" r="2.4"/>' for left, top in places
        )
    return f'<path class="line c{style}" d="M{path}"{dash}/>{dots}'
