"""What stands in a panel: lines, stacks, heatmaps, axes; colours of both themes."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from k8s.dashboards.answers import Asking, Curve, buckets
from k8s.dashboards.units import in_unit
from matplotlib import dates
from matplotlib.ticker import FuncFormatter, MaxNLocator

PALETTE = (
    "#5a9e3d",
    "#d69f00",
    "#3d71d9",
    "#d9573d",
    "#8f5fc4",
    "#1a8f98",
    "#c4408b",
    "#7a6a4f",
    "#5b7083",
)


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    page: str
    panel: str
    text: str
    faint: str
    grid: str
    good: str
    bad: str
    map: str
    """Colour map of heatmaps, from nothing to most."""
    lines: tuple[str, ...] = PALETTE

    @property
    def settings(self) -> Any:
        """For matplotlib."""
        return {"font.family": "DejaVu Sans", "text.color": self.text, "axes.facecolor": self.panel}


LIGHT = Theme(
    page="#f4f5f5",
    panel="#ffffff",
    text="#24292e",
    faint="#57606a",
    grid="#dcdfe2",
    good="#2c7a2c",
    bad="#c4162a",
    map="Blues",
)
DARK = Theme(
    page="#111217",
    panel="#181b1f",
    text="#d8d9da",
    faint="#9fa3a8",
    grid="#2c3038",
    good="#73bf69",
    bad="#f2495c",
    map="viridis",
)


def lines(
    axes: Any,
    panel: dict[str, Any],
    found: Sequence[Curve],
    times: np.ndarray,
    colors: Sequence[str],
) -> None:
    """Curves, or with stacking areas on top of one another."""
    moments = _moments(times)
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    joins_gaps = custom.get("spanNulls", False)
    values = [_joined(curve.values, times) if joins_gaps else curve.values for curve in found]
    if custom.get("stacking", {}).get("mode") == "normal":
        # Before the first value and after the last there is no area, not one of height 0.
        known = np.isfinite(values).any(axis=0)
        below = np.where(known, 0.0, np.nan)
        for color, curve in zip(colors, values, strict=True):
            above = below + np.nan_to_num(curve)
            axes.fill_between(moments, below, above, color=color, alpha=0.6, linewidth=0)
            axes.plot(moments, above, color=color, linewidth=1)
            below = above
        axes.set_ylim(0, max(np.nanmax(below) * 1.08, 1e-9))
        return
    for color, curve in zip(colors, values, strict=True):
        axes.plot(moments, curve, color=color, linewidth=1.2)
        known = np.isfinite(curve)
        alone = known & ~np.r_[False, known[:-1]] & ~np.r_[known[1:], False]
        axes.plot(moments[alone], curve[alone], "o", color=color, markersize=2.5)
    ends = (custom.get("axisSoftMin"), custom.get("axisSoftMax"))
    _limits(axes, np.concatenate([*values, [end for end in ends if end is not None]]))


def heatmap(axes: Any, scale: Any, found: Sequence[Curve], times: np.ndarray, theme: Theme) -> None:
    """Rows of buckets, each as high as the others; ``scale`` tells what the colours mean."""
    bounds, filled = buckets(found)
    step = times[1] - times[0]
    edges = _moments(np.append(times - step / 2, times[-1] + step / 2))
    mesh = axes.pcolormesh(
        edges, np.arange(len(bounds) + 1), np.ma.masked_less_equal(filled, 0), cmap=theme.map
    )
    shown = range(1, len(bounds), 2)
    axes.set_yticks(
        [n + 1 for n in shown], [f"{bounds[n]:g}".replace("inf", "+Inf") for n in shown]
    )
    axes.set_xlim(edges[0], edges[-1])
    _quiet(axes, theme)
    bar = axes.figure.colorbar(mesh, cax=scale)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)
    bar.formatter = FuncFormatter(lambda value, _: in_unit(value, "ops"))
    bar.ax.tick_params(labelsize=7, length=0, labelcolor=theme.faint)
    bar.update_ticks()


def time_axis(axes: Any, asking: Asking, theme: Theme) -> None:
    """Times of day, UTC."""
    form = "%H:%M" if asking.end_s - asking.start_s > 120 else "%H:%M:%S"
    axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=3, maxticks=6))
    axes.xaxis.set_major_formatter(dates.DateFormatter(form))
    axes.set_xlim(*_moments(np.array([asking.start_s, asking.end_s])))
    axes.tick_params(axis="x", labelsize=7.5, length=0, labelcolor=theme.faint)


def value_axis(axes: Any, panel: dict[str, Any], theme: Theme) -> None:
    """Values in the panel's unit."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: in_unit(value, unit)))
    _quiet(axes, theme)


def rule(axes: Any, theme: Theme) -> None:
    """A thin line as wide as the axes."""
    axes.set_facecolor(theme.grid)
    bare(axes)


def bare(axes: Any) -> None:
    """Axes that are a patch of colour."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def written(panel: dict[str, Any], value: float) -> str:
    """A number in the panel's unit."""
    defaults = panel["fieldConfig"]["defaults"]
    return in_unit(value, defaults["unit"], defaults.get("decimals"))


def color_of_number(panel: dict[str, Any], value: float, theme: Theme) -> str:
    """By the panel's thresholds."""
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    # Grafana's first step has no value: it is reached by every number.
    reached = [
        step["color"] for step in steps if step.get("value") is None or step["value"] <= value
    ]
    return {"green": theme.good, "red": theme.bad}[reached[-1]]


def _quiet(axes: Any, theme: Theme) -> None:
    axes.grid(True, axis="both", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(axis="y", labelsize=7.5, length=0, labelcolor=theme.faint)


def _limits(axes: Any, values: np.ndarray) -> None:
    """Near 0 the axis begins there, as in Grafana; a flat line gets room on both sides."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    begins_at_zero = low >= 0 and low - 4 * room < 0
    axes.set_ylim(0 if begins_at_zero else low - room, high + room)


def _joined(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Gaps bridged by straight lines; before the first value and after the last there is none."""
    known = np.isfinite(values)
    return np.interp(times, times[known], values[known], left=np.nan, right=np.nan)


def _moments(times: np.ndarray) -> np.ndarray:
    return np.array(
        [dates.date2num(datetime.datetime.fromtimestamp(each, datetime.UTC)) for each in times]
    )
