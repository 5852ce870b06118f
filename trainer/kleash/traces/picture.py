"""A step's timeline as a picture: a row for each track, a bar for each span."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kleash.traces.read import RecordedSpan, StepTrace
from kleash.traces.tracks import tracks_of

# Okabe and Ito's colours, which people who see few colours tell apart: one for each kind of work,
# in whatever process it is done.
COLOURS = {
    "generate": "#0072B2",
    "score": "#E69F00",
    "reference": "#009E73",
    "update": "#D55E00",
    "publish": "#CC79A7",
    "old_log_probs": "#56B4E9",
    "evaluation": "#F0E442",
    "checkpoint": "#999999",
}
OTHER = "#D0D0D0"
INSET = 0.16
"""By which a child is drawn lower than its parent, of a row's height."""
DEEPEST = 4
LABEL_SHARE = 0.06
"""Of the step: shorter bars have no room for their name."""
EDGE_SHARE = 0.005
"""Of shorter bars an edge would leave nothing."""


def draw(trace: StepTrace, path: Path) -> None:
    """Write the picture, in the format of the path's suffix."""
    from matplotlib.figure import Figure

    rows = [
        (process.name, track) for process, tracks in tracks_of(trace).items() for track in tracks
    ]
    figure = Figure(figsize=(12, 1.3 + 0.34 * len(rows)), layout="constrained")
    axes: Any = figure.subplots()
    for row, (_, track) in enumerate(rows):
        for span in track.spans:
            _bar(axes, trace, span, row, _depth(span, trace, track.spans))
    axes.set_yticks(range(len(rows)), [f"{process}  {track.name}" for process, track in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, trace.seconds * 1e3)
    axes.set_xlabel("milliseconds since the step began")
    axes.set_title(f"PPO step {trace.step}: {trace.seconds:.2f} s")
    axes.grid(axis="x", color="#E0E0E0", linewidth=0.6)
    axes.set_axisbelow(True)
    _legend(figure, trace)
    figure.savefig(path, dpi=110)


def phase_of(span: RecordedSpan, trace: StepTrace) -> str:
    """The nearest kind of work that a span is part of, by name; "" for none."""
    its: RecordedSpan | None = span
    while its is not None:
        if its.name in COLOURS:
            return its.name
        its = trace.by_id.get(its.parent_id)
    return ""


def _bar(axes: Any, trace: StepTrace, span: RecordedSpan, row: int, depth: int) -> None:
    start, length = span.start_ns - trace.root.start_ns, span.end_ns - span.start_ns
    top = row - 0.4 + INSET * depth
    axes.broken_barh(
        [(start / 1e6, length / 1e6)],
        (top, row + 0.4 - top),
        facecolor=COLOURS.get(phase_of(span, trace), OTHER),
        edgecolor="white",
        linewidth=0.4 if length / 1e9 > EDGE_SHARE * trace.seconds else 0,
    )
    is_leaf_here = not any(
        child.process == span.process for child in trace.children.get(span.span_id, ())
    )
    if is_leaf_here and length / 1e9 > LABEL_SHARE * trace.seconds:
        axes.text(
            (start + length / 2) / 1e6,
            (top + row + 0.4) / 2,
            span.short_name,
            ha="center",
            va="center",
            fontsize=7,
        )


def _depth(span: RecordedSpan, trace: StepTrace, on_track: list[RecordedSpan]) -> int:
    """How many of its ancestors lie under it on its track."""
    there = {its.span_id for its in on_track}
    depth, parent = 0, trace.by_id.get(span.parent_id)
    while parent is not None and parent.span_id in there:
        depth, parent = depth + 1, trace.by_id.get(parent.parent_id)
    return min(depth, DEEPEST)


def _legend(figure: Any, trace: StepTrace) -> None:
    from matplotlib.patches import Patch

    seen = {phase_of(span, trace) for span in trace.spans}
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in seen]
    figure.legend(handles=handles, ncols=len(handles), loc="outside lower center", frameon=False)
