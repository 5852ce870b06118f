"""Spans as lines of a file: each is an ExportTraceServiceRequest of OTLP as JSON.

The form of OpenTelemetry's own file exporter, which its Collector's otlpjsonfile receiver reads
(https://opentelemetry.io/docs/specs/otel/protocol/file-exporter/): ids are hex digits, times are
strings of nanoseconds, each attribute is an object with its type.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

logger = logging.getLogger(__name__)

_KINDS = {SpanKind.INTERNAL: 1, SpanKind.SERVER: 2, SpanKind.CLIENT: 3}
_STATUS = {StatusCode.UNSET: 0, StatusCode.OK: 1, StatusCode.ERROR: 2}


class FileExporter(SpanExporter):
    """Appends to a file that belongs to one process at a time, made at the first line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._has_warned = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Write a line."""
        line = json.dumps(as_request(spans), separators=(",", ":"), ensure_ascii=False) + "\n"
        try:
            with self._lock:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "the trace cannot be written to %s: %s", self._path, error.strerror or error
                )
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def as_request(spans: Sequence[ReadableSpan]) -> dict[str, Any]:
    """Spans of one process."""
    resource = spans[0].resource.attributes if spans else {}
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(resource)},
                "scopeSpans": [{"scope": {"name": "kleash"}, "spans": [_span(it) for it in spans]}],
            }
        ]
    }


def _span(span: ReadableSpan) -> dict[str, Any]:
    context = span.get_span_context()
    assert context is not None
    described: dict[str, Any] = {
        "traceId": format_trace_id(context.trace_id),
        "spanId": format_span_id(context.span_id),
        "name": span.name,
        "kind": _KINDS[span.kind],
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
        "attributes": _attributes(span.attributes or {}),
    }
    if span.parent is not None:
        described["parentSpanId"] = format_span_id(span.parent.span_id)
    if span.links:
        described["links"] = [
            {
                "traceId": format_trace_id(link.context.trace_id),
                "spanId": format_span_id(link.context.span_id),
            }
            for link in span.links
        ]
    if code := _STATUS[span.status.status_code]:
        described["status"] = {"code": code}
    return described


def _attributes(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [_value(each) for each in value]}}
