"""Spans from the files of the file exporter, and the traces of PPO steps among them.

A line is an ExportTraceServiceRequest of OTLP as JSON: what kleash.base.trace_file writes, and the
file exporters of OpenTelemetry's Collector.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kleash.base.errors import ConfigError, DataError

STEP_SPAN, STEP = "ppo_step", "kleash.step"
INTERNAL, SERVER, CLIENT = 1, 2, 3
"""Kinds of spans."""

_ERROR = 2


@dataclass(frozen=True)
class Process:
    """Who recorded a span."""

    service: str
    """As its resource names it, "kleash-trainer"."""
    instance: str
    """Differs between two processes of one name, also when one follows the other."""
    place: str
    """For people: "pid 4711 on node-3"."""

    @property
    def name(self) -> str:
        """Short: "trainer"."""
        return self.service.removeprefix("kleash-")


@dataclass(frozen=True, eq=False)
class RecordedSpan:
    """A piece of work; times are nanoseconds of Unix time, of its process's clock."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    """INTERNAL, SERVER, CLIENT, or another number of OTLP."""
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    links: tuple[str, ...]
    """Ids of spans."""
    has_failed: bool
    process: Process

    @property
    def short_name(self) -> str:
        """Of a call the method alone."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True, eq=False)
class StepTrace:
    """All spans of one PPO step, of whatever process."""

    step: int
    root: RecordedSpan
    spans: Sequence[RecordedSpan]
    """By their start."""

    @cached_property
    def by_id(self) -> dict[str, RecordedSpan]:
        return {span.span_id: span for span in self.spans}

    @cached_property
    def children(self) -> dict[str, list[RecordedSpan]]:
        """Of each span that has some, by their start."""
        found: dict[str, list[RecordedSpan]] = {}
        for span in self.spans:
            found.setdefault(span.parent_id, []).append(span)
        return found

    @property
    def seconds(self) -> float:
        return (self.root.end_ns - self.root.start_ns) / 1e9


def read_spans(files: Iterable[Path]) -> list[RecordedSpan]:
    """Every span of ``files``. A last line that is being written is left out.

    Raises DataError for a line that is none of OTLP.
    """
    return [span for file in files for span in _spans_of(file)]


def step_traces(spans: Iterable[RecordedSpan]) -> dict[int, StepTrace]:
    """The traces of steps that have ended, by step; of one that was done again, the last."""
    by_trace: dict[str, list[RecordedSpan]] = {}
    for span in spans:
        by_trace.setdefault(span.trace_id, []).append(span)
    found: dict[int, StepTrace] = {}
    for its in by_trace.values():
        root = next((it for it in its if it.name == STEP_SPAN and not it.parent_id), None)
        if root is None:
            continue
        step = int(root.attributes[STEP])
        if step not in found or found[step].root.start_ns < root.start_ns:
            its.sort(key=lambda it: (it.start_ns, -it.end_ns))
            found[step] = StepTrace(step, root, its)
    return found


def files_of_run(run: Path, more: Sequence[Path] = ()) -> list[Path]:
    """The files of traces in a run's folder, and ``more``. Raises ConfigError without any."""
    found = [*sorted((run / "traces").glob("*.jsonl")), *more]
    files = list({file.resolve(): file for file in found}.values())
    for file in more:
        if not file.is_file():
            raise ConfigError(f"there is no file {file}; name one that the file exporter wrote.")
    if not files:
        raise ConfigError(
            f"{run / 'traces'} holds no spans; trace a run with --tracing.exporter=file, and name "
            "the files of services that ran elsewhere with --spans."
        )
    return files


def _spans_of(file: Path) -> Iterator[RecordedSpan]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                return
            if not line.strip():
                continue
            try:
                request = json.loads(line)
                for part in request["resourceSpans"]:
                    process = _process(part.get("resource", {}))
                    for scope in part["scopeSpans"]:
                        for span in scope["spans"]:
                            yield _span(span, process)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"this is no line of spans in OTLP's JSON ({type(error).__name__}: {error}); "
                    "name a file that the file exporter wrote.",
                    path=str(file),
                    line=number,
                ) from None


def _process(resource: dict[str, Any]) -> Process:
    known = _attributes(resource.get("attributes", ()))
    pid, host = known.get("process.pid", ""), known.get("host.name", "")
    place = " on ".join(filter(None, (f"pid {pid}" if pid != "" else "", str(host))))
    instance = str(known.get("service.instance.id", place))
    return Process(str(known.get("service.name", "unknown")), instance, place)


def _span(span: dict[str, Any], process: Process) -> RecordedSpan:
    start, end = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
    return RecordedSpan(
        trace_id=span["traceId"],
        span_id=span["spanId"],
        parent_id=span.get("parentSpanId", ""),
        name=span["name"],
        kind=int(span.get("kind", INTERNAL)),
        start_ns=start,
        end_ns=max(start, end),
        attributes=_attributes(span.get("attributes", ())),
        links=tuple(link["spanId"] for link in span.get("links", ())),
        has_failed=span.get("status", {}).get("code", 0) == _ERROR,
        process=process,
    )


def _attributes(pairs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {pair["key"]: _value(pair["value"]) for pair in pairs}


def _value(value: dict[str, Any]) -> Any:
    (kind, its), *_ = value.items()
    if kind == "intValue":
        return int(its)
    if kind == "arrayValue":
        return [_value(each) for each in its.get("values", ())]
    return its
