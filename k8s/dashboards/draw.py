"""Pictures of the dashboards, drawn from a Prometheus as Grafana lays them out.

    python -m k8s.dashboards.draw http://127.0.0.1:9090 rlhf docs/images --minutes=10

Grafana's grid has 24 columns; a panel of height 8 is drawn 8 * UNIT_PX high.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from k8s.dashboards import plots
from k8s.dashboards.answers import Asking, curves, numbers, rows
from k8s.dashboards.plots import DARK, LIGHT, Theme
from k8s.dashboards.prometheus_api import PrometheusApi
from k8s.dashboards.saved import NAMES, dashboard
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

COLUMNS, WIDTH_PX, UNIT_PX, GAP_PX, TOP_PX = 24, 1560, 29, 8, 44
DPI = 100
COLORS_OF_A_PICTURE = 256
"""Enough for lines, letters and a heatmap; keeps the files small."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels from the top left."""

    x: float
    y: float
    width: float
    height: float


def height_px(content: dict[str, Any]) -> int:
    """Height of a dashboard's picture."""
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in content["panels"])
    return TOP_PX + bottom * UNIT_PX + GAP_PX


def draw(content: dict[str, Any], asking: Asking, path: Path, theme: Theme = LIGHT) -> list[str]:
    """Draw a dashboard into a PNG file; returns the titles of panels that had no data."""
    height, without_data = height_px(content), []
    with mpl.rc_context(theme.settings):
        figure = Figure(figsize=(WIDTH_PX / DPI, height / DPI), dpi=DPI, facecolor=theme.page)
        FigureCanvasAgg(figure)
        page = Page(figure, height, theme)
        page.write(GAP_PX + 6, TOP_PX / 2, content["title"], size=14, weight="bold")
        page.write(WIDTH_PX - GAP_PX - 6, TOP_PX / 2, _period(asking), align="right", faint=True)
        for panel in content["panels"]:
            place = panel["gridPos"]
            column = (WIDTH_PX - GAP_PX) / COLUMNS
            box = Box(
                GAP_PX + place["x"] * column,
                TOP_PX + place["y"] * UNIT_PX,
                place["w"] * column - GAP_PX,
                place["h"] * UNIT_PX - GAP_PX,
            )
            if panel["type"] == "row":
                page.write(box.x + 6, box.y + box.height / 2 + 3, panel["title"], weight="bold")
            elif not _panel(page, box, panel, asking):
                without_data.append(panel["title"])
        figure.savefig(path)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(COLORS_OF_A_PICTURE, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    return without_data


@dataclass(frozen=True)
class Page:
    """A figure that is drawn on in pixels from the top left."""

    figure: Figure
    height: float
    theme: Theme

    def write(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 10,
        weight: str = "normal",
        align: str = "left",
        color: str | None = None,
        faint: bool = False,
    ) -> Any:
        """Text with its middle at ``y``."""
        return self.figure.text(
            x / WIDTH_PX,
            1 - y / self.height,
            text,
            size=size * 72 / DPI * 1.25,
            weight=weight,
            ha=align,
            va="center",
            color=color or (self.theme.faint if faint else self.theme.text),
        )

    def axes(self, box: Box) -> Any:
        """Axes in a rectangle."""
        return self.figure.add_axes(
            (
                box.x / WIDTH_PX,
                1 - (box.y + box.height) / self.height,
                box.width / WIDTH_PX,
                box.height / self.height,
            )
        )

    def width_of(self, text: Any) -> float:
        """Pixels of a text that was written."""
        return text.get_window_extent(self.figure.canvas.get_renderer()).width  # pyright: ignore[reportAttributeAccessIssue]

    def frame(self, box: Box) -> None:
        """A panel's background."""
        self.figure.add_artist(
            FancyBboxPatch(
                (box.x / WIDTH_PX, 1 - (box.y + box.height) / self.height),
                box.width / WIDTH_PX,
                box.height / self.height,
                boxstyle="square,pad=0",
                facecolor=self.theme.panel,
                edgecolor=self.theme.grid,
                linewidth=0.8,
                zorder=-1,
            )
        )


def _panel(page: Page, box: Box, panel: dict[str, Any], asking: Asking) -> bool:
    page.frame(box)
    page.write(box.x + 10, box.y + 15, panel["title"], weight="bold", size=9.5)
    inner = Box(box.x + 10, box.y + 30, box.width - 20, box.height - 38)
    has_data = _DRAWN[panel["type"]](page, inner, panel, asking)
    if not has_data:
        page.write(
            inner.x + inner.width / 2,
            inner.y + inner.height / 2,
            "No data",
            align="center",
            faint=True,
        )
    return has_data


def _timeseries(page: Page, box: Box, panel: dict[str, Any], asking: Asking) -> bool:
    found = curves(asking, panel["targets"])
    if not found:
        return False
    colors = [page.theme.lines[n % len(page.theme.lines)] for n in range(len(found))]
    names = [curve.name for curve in found]
    used = _legend(page, box, list(zip(names, colors, strict=True)))
    axes = page.axes(Box(box.x + 58, box.y + 5, box.width - 64, box.height - used - 29))
    plots.lines(axes, panel, found, asking.times, colors)
    plots.time_axis(axes, asking, page.theme)
    plots.value_axis(axes, panel, page.theme)
    return True


def _heatmap(page: Page, box: Box, panel: dict[str, Any], asking: Asking) -> bool:
    found = curves(asking, panel["targets"])
    if not found:
        return False
    axes = page.axes(Box(box.x + 58, box.y + 6, box.width - 150, box.height - 30))
    scale = page.axes(Box(box.x + box.width - 78, box.y + 6, 10, box.height - 30))
    plots.heatmap(axes, scale, found, asking.times, page.theme)
    plots.time_axis(axes, asking, page.theme)
    return True


def _stat(page: Page, box: Box, panel: dict[str, Any], asking: Asking) -> bool:
    found = numbers(asking, panel["targets"])
    for place, (name, value) in enumerate(found):
        x = box.x + box.width * (place + 0.5) / len(found)
        text = plots.written(panel, value)
        shown = page.write(
            x,
            box.y + box.height * 0.45,
            text,
            size=26,
            weight="bold",
            align="center",
            color=plots.color_of_number(panel, value, page.theme),
        )
        room = box.width / len(found) - 12
        shown.set_size(shown.get_size() * min(1.0, room / page.width_of(shown)))
        if len(found) > 1:
            page.write(x, box.y + box.height * 0.78, name, align="center", faint=True)
    return bool(found)


def _table(page: Page, box: Box, panel: dict[str, Any], asking: Asking) -> bool:
    headings, cells = rows(asking, panel)
    line_px, size = 24, 8.5
    shown = cells[: int(box.height // line_px) - 1]
    longest = [max(len(row[n]) for row in [headings, *shown]) for n in range(len(headings))]
    shares = [max(6, min(length, 22)) for length in longest]
    for number, row in enumerate([headings, *shown]):
        x, y = box.x + 4, box.y + line_px * (number + 0.5)
        for share, cell in zip(shares, row, strict=True):
            width = (box.width - 8) * share / sum(shares)
            text = page.write(x, y, cell, size=size, weight="normal" if number else "bold")
            _shorten(page, text, width - 10)
            x += width
        if number:
            plots.rule(page.axes(Box(box.x, y - line_px / 2, box.width, 1)), page.theme)
    if len(shown) < len(cells):
        page.write(
            box.x + box.width,
            box.y - 15,
            f"{len(cells) - len(shown)} more rows",
            size=8,
            align="right",
            faint=True,
        )
    return bool(cells)


def _legend(page: Page, box: Box, entries: list[tuple[str, str]]) -> float:
    """Names of the curves at the bottom of a panel, in at most two lines; returns their pixels."""
    line_px, most_lines, mark_px, size = 16, 2, 14, 8
    lines: list[list[tuple[Any, float]]] = [[]]
    used, left_out = 0.0, 0
    for name, color in entries:
        text = page.write(0, 0, name, size=size, faint=True)
        _shorten(page, text, box.width * 0.6)
        width = page.width_of(text) + mark_px + 12
        if used + width > box.width - 60 and lines[-1]:
            if len(lines) == most_lines:
                text.remove()
                left_out += 1
                continue
            lines.append([])
            used = 0.0
        lines[-1].append((text, used))
        text.legend_color = color
        used += width
    top = box.y + box.height - line_px * len(lines) + 4
    for number, line in enumerate(lines):
        y = top + line_px * (number + 0.5)
        for text, x in line:
            text.set_position(((box.x + x + mark_px) / WIDTH_PX, 1 - y / page.height))
            mark = page.axes(Box(box.x + x, y - 1.5, mark_px - 4, 3))
            mark.set_facecolor(text.legend_color)
            plots.bare(mark)
    if left_out:
        page.write(
            box.x + box.width,
            top + line_px * (len(lines) - 0.5),
            f"+ {left_out}",
            size=size,
            align="right",
            faint=True,
        )
    return line_px * len(lines)


def _shorten(page: Page, text: Any, width: float) -> None:
    """Cut letters from the middle of a text until it fits."""
    full = text.get_text()
    keep = len(full)
    while keep > 3 and page.width_of(text) > width:
        keep -= 1
        head = keep // 2
        text.set_text(f"{full[:head]}…{full[len(full) - (keep - head) :]}")


def _period(asking: Asking) -> str:
    start, end = (time.strftime("%H:%M:%S", time.gmtime(t)) for t in (asking.start_s, asking.end_s))
    return f"namespace {asking.namespace}   ·   {start} to {end} UTC"


_DRAWN: dict[str, Callable[[Page, Box, dict[str, Any], Asking], bool]] = {
    "timeseries": _timeseries,
    "heatmap": _heatmap,
    "stat": _stat,
    "table": _table,
}


def draw_all(asking: Asking, folder: Path, theme: Theme = LIGHT) -> dict[Path, list[str]]:
    """Draw every dashboard into ``folder``; the files, and the titles of panels without data."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"dashboard-{name}.png" for name in NAMES}
    return {path: draw(dashboard(name), asking, path, theme) for name, path in paths.items()}


def described(drawn: dict[Path, list[str]]) -> str:
    """What ``draw_all`` did, a line for each file."""
    lines = []
    for path, without_data in drawn.items():
        empty = f", no data in: {', '.join(without_data)}" if without_data else ""
        lines.append(f"{path}: {path.stat().st_size / 1000:.0f} kB{empty}\n")
    return "".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("url", help="of Prometheus, http://127.0.0.1:9090")
    parser.add_argument("namespace", help="whose pods are shown")
    parser.add_argument("folder", type=Path, help="for the pictures")
    parser.add_argument("--minutes", type=float, default=60, help="until now (default: 60)")
    parser.add_argument("--scrape-interval", type=float, default=30, help="seconds (default: 30)")
    parser.add_argument("--dark", action="store_true", help="Grafana's dark colours")
    options = parser.parse_args()
    now = time.time()
    asking = Asking(
        PrometheusApi(options.url),
        namespace=options.namespace,
        start_s=now - 60 * options.minutes,
        end_s=now,
        scrape_interval_s=options.scrape_interval,
    )
    drawn = draw_all(asking, options.folder, DARK if options.dark else LIGHT)
    sys.stdout.write(described(drawn))


if __name__ == "__main__":
    main()
