"""Where spans go on a timeline: processes, and in each the tracks, on which nothing overlaps.

A child lies on its parent's track, inside of it. What runs beside its siblings gets a track named
after it, with others of its name; calls from and to other processes share tracks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kleash.traces.read import CLIENT, SERVER, Process, RecordedSpan, StepTrace

CALLS = "calls"


@dataclass(eq=False)
class Track:
    """Spans of one process, each after the one before or inside of it."""

    name: str
    spans: list[RecordedSpan] = field(default_factory=list)
    """By their start, the longer one first."""
    _open: list[RecordedSpan] = field(default_factory=list)

    def fits(self, span: RecordedSpan, parent: RecordedSpan | None) -> bool:
        """Whether ``span`` lies inside of ``parent`` here, or on free ground without one."""
        while self._open and self._open[-1].end_ns <= span.start_ns:
            self._open.pop()
        if parent is None:
            return not self._open
        return bool(self._open) and self._open[-1] is parent and span.end_ns <= parent.end_ns

    def put(self, span: RecordedSpan) -> None:
        self.spans.append(span)
        self._open.append(span)


def tracks_of(trace: StepTrace) -> dict[Process, list[Track]]:
    """The tracks of each process, that of the step's trainer first."""
    processes = sorted(
        {span.process for span in trace.spans},
        key=lambda its: (its != trace.root.process, its.service, its.instance),
    )
    return {
        process: _place([span for span in trace.spans if span.process == process])
        for process in processes
    }


def _place(spans: list[RecordedSpan]) -> list[Track]:
    by_id = {span.span_id: span for span in spans}
    depths: dict[str, int] = {}

    def depth(span: RecordedSpan) -> int:
        if span.span_id not in depths:
            parent = by_id.get(span.parent_id)
            depths[span.span_id] = 0 if parent is None else depth(parent) + 1
        return depths[span.span_id]

    beside = _beside_siblings(spans)
    groups: dict[str, list[Track]] = {}
    track_of: dict[str, Track] = {}
    for span in sorted(spans, key=lambda it: (it.start_ns, -it.end_ns, depth(it))):
        parent = by_id.get(span.parent_id)
        track = track_of.get(span.parent_id)
        if track is None or span.span_id in beside or not track.fits(span, parent):
            name = CALLS if span.kind in (SERVER, CLIENT) else span.name
            group = groups.setdefault(name, [])
            track = next((it for it in group if it.fits(span, None)), None)
            if track is None:
                track = Track(f"{name} {len(group) + 1}" if group else name)
                group.append(track)
        track.put(span)
        track_of[span.span_id] = track
    return [track for group in groups.values() for track in group]


def _beside_siblings(spans: list[RecordedSpan]) -> set[str]:
    """Ids of spans during which another child of the same parent runs."""
    found: set[str] = set()
    last: dict[str, RecordedSpan] = {}
    for span in sorted(spans, key=lambda it: it.start_ns):
        before = last.get(span.parent_id) if span.parent_id else None
        if before is not None and before.end_ns > span.start_ns:
            found |= {before.span_id, span.span_id}
        if before is None or span.end_ns > before.end_ns:
            last[span.parent_id] = span
    return found
