"""Sums over the trace of a step: seconds of each phase, what overlaps, and the critical path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kleash.traces.read import RecordedSpan, StepTrace

Interval = tuple[int, int]
"""Start and end, nanoseconds."""

ROLLOUT_PHASES = ("generate", "score", "reference")
"""Side by side, within a step's rollout."""
STEP_PHASES = ("old_log_probs", "keep_samples", "update", "publish", "evaluation", "checkpoint")
"""One after the other."""


@dataclass(frozen=True)
class Phase:
    """A part of a step."""

    name: str
    seconds: float
    """In which at least one span of it was under way."""
    num_spans: int
    hidden: float | None
    """Of score and reference: the share of their seconds in which responses were generated."""


@dataclass(frozen=True)
class PathPart:
    """What the step waited for, summed over a span's name."""

    process: str
    name: str
    seconds: float


def phases(trace: StepTrace) -> list[Phase]:
    """The phases that the step had, in their order. Those of its evaluation are not counted."""
    top = trace.children.get(trace.root.span_id, [])
    within = [
        span
        for rollout in top
        if rollout.name == "rollout"
        for span in trace.children.get(rollout.span_id, [])
    ]
    generation = union(_intervals(within, "generate"))
    found = []
    for name, spans in (
        *((name, within) for name in ROLLOUT_PHASES),
        *((name, top) for name in STEP_PHASES),
    ):
        intervals = _intervals(spans, name)
        if not intervals:
            continue
        covered = union(intervals)
        seconds = total_s(covered)
        hidden = None
        if name in ("score", "reference"):
            hidden = total_s(common(covered, generation)) / seconds if seconds else 0.0
        found.append(Phase(name, seconds, len(intervals), hidden))
    return found


def critical_path(trace: StepTrace) -> list[PathPart]:
    """What the step waited for, longest first; the parts add up to the step.

    Going back from the end: a span waits for whichever child was under way last; of several at the
    same time, for the one that began first, as the others' work came out of it.
    """
    sums: dict[tuple[str, str], int] = {}
    _walk(trace, trace.root, trace.root.start_ns, trace.root.end_ns, sums)
    parts = [PathPart(process, name, ns / 1e9) for (process, name), ns in sums.items() if ns]
    return sorted(parts, key=lambda part: -part.seconds)


def _walk(
    trace: StepTrace,
    span: RecordedSpan,
    start_ns: int,
    end_ns: int,
    sums: dict[tuple[str, str], int],
) -> None:
    """Divide start..end, a part of ``span``, among it and what is below it."""
    at = end_ns
    children = trace.children.get(span.span_id, [])
    while at > start_ns:
        running = [child for child in children if child.start_ns < at and child.end_ns > start_ns]
        if not running:
            break
        last = max(running, key=lambda child: (min(child.end_ns, at), -child.start_ns))
        last_end, last_start = min(last.end_ns, at), max(last.start_ns, start_ns)
        _add(sums, span, at - last_end)
        _walk(trace, last, last_start, last_end, sums)
        at = last_start
    _add(sums, span, at - start_ns)


def _add(sums: dict[tuple[str, str], int], span: RecordedSpan, ns: int) -> None:
    key = (span.process.name, span.short_name)
    sums[key] = sums.get(key, 0) + ns


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as intervals that do not touch, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def common(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """What lies in both of two unions."""
    return [(max(a, c), min(b, d)) for a, b in left for c, d in right if max(a, c) < min(b, d)]


def total_s(intervals: Iterable[Interval]) -> float:
    """Seconds of intervals that do not overlap."""
    return sum(end - start for start, end in intervals) / 1e9


def _intervals(spans: Iterable[RecordedSpan], name: str) -> list[Interval]:
    return [(span.start_ns, span.end_ns) for span in spans if span.name == name]
