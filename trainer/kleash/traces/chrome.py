"""A step as a timeline that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

The Trace Event Format: complete events ("X") in whole microseconds of Unix time, names of processes
and tracks ("M"), and arrows ("s" to "f") from a call to its handling and from a call to the batch
that computed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kleash.traces.read import CLIENT, INTERNAL, SERVER, RecordedSpan, StepTrace
from kleash.traces.tracks import tracks_of

_KINDS = {INTERNAL: "internal", SERVER: "server", CLIENT: "client"}


def chrome_trace(trace: StepTrace) -> dict[str, Any]:
    """The JSON object of the file."""
    places: dict[str, dict[str, int]] = {}
    events: list[dict[str, Any]] = []
    for pid, (process, tracks) in enumerate(tracks_of(trace).items(), 1):
        name = f"{process.name} ({process.place})" if process.place else process.name
        events.append(_name("process_name", name, pid=pid, tid=0))
        events.append(_order("process_sort_index", pid, pid=pid, tid=0))
        for tid, track in enumerate(tracks, 1):
            events.append(_name("thread_name", track.name, pid=pid, tid=tid))
            events.append(_order("thread_sort_index", tid, pid=pid, tid=tid))
            for span in track.spans:
                places[span.span_id] = {"pid": pid, "tid": tid}
                events.append(_complete(span, places[span.span_id]))
    for number, (source, target, what) in enumerate(_arrows(trace), 1):
        at = min(max(source.start_ns, target.start_ns), source.end_ns)
        known = {"id": number, "name": what, "cat": what}
        events.append({"ph": "s", "ts": at // 1000, **places[source.span_id], **known})
        events.append(
            {"ph": "f", "bp": "e", "ts": target.start_ns // 1000, **places[target.span_id], **known}
        )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"step": trace.step, "trace_id": trace.root.trace_id},
    }


def _complete(span: RecordedSpan, place: dict[str, int]) -> dict[str, Any]:
    # Both ends are cut to microseconds: what nests in nanoseconds nests here.
    start, end = span.start_ns // 1000, span.end_ns // 1000
    arguments = {**span.attributes, "span_id": span.span_id}
    if span.has_failed:
        arguments["failed"] = True
    return {
        "ph": "X",
        "name": span.short_name,
        "cat": _KINDS.get(span.kind, "internal"),
        "ts": start,
        "dur": end - start,
        **place,
        "args": arguments,
    }


def _arrows(trace: StepTrace) -> Iterator[tuple[RecordedSpan, RecordedSpan, str]]:
    for span in trace.spans:
        parent = trace.by_id.get(span.parent_id)
        if parent is not None and parent.process != span.process:
            yield parent, span, "call"
        for link in span.links:
            linked = trace.by_id.get(link)
            if linked is not None and linked is not parent:
                yield linked, span, "batch"


def _name(what: str, name: str, **place: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "args": {"name": name}, **place}


def _order(what: str, index: int, **place: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "args": {"sort_index": index}, **place}
