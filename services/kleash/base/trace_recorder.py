"""Spans by OpenTelemetry's SDK; imported only by a process that traces. tracing.py is its face.

The provider is our own and not the process's global one: an application that embeds Kleash keeps
its tracing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import (
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kleash.base import tracing
from kleash.base.tracing import Kind, Pairs

SHUT_DOWN_S = 5.0
"""For what is left to be written."""

STEP = "kleash.step"
"""A root that names a step was chosen by its trainer."""

_KINDS: dict[str, SpanKind] = {
    "internal": SpanKind.INTERNAL,
    "client": SpanKind.CLIENT,
    "server": SpanKind.SERVER,
}
_FIELDS = ("traceparent", "tracestate")


class OtelSpan:
    """A span of the SDK, with times of tracing.now_ns."""

    __slots__ = ("otel",)

    def __init__(self, otel: trace.Span) -> None:
        self.otel = otel

    def note(self, **attributes: Any) -> None:
        self.otel.set_attributes(_named(attributes))

    def fail(self, kind: str) -> None:
        self.otel.set_attribute("error.type", kind)
        self.otel.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        self.otel.end(tracing.now_ns())


class OtelRecorder:
    """Implements tracing.Recorder."""

    def __init__(
        self, processor: SpanProcessor, resource: Mapping[str, str | int], *, sample_ratio: float
    ) -> None:
        """Args:
        resource: attributes of the process.
        sample_ratio: share that is recorded of what comes without a caller's trace.
        """
        self._provider = TracerProvider(
            sampler=ParentBased(_Root(sample_ratio)),
            # What OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say goes before our names.
            resource=Resource.create(resource).merge(OTELResourceDetector().detect()),
            span_limits=SpanLimits(),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("kleash")
        self._propagator = TraceContextTextMapPropagator()
        self._ids = RandomIdGenerator()

    def open_span(
        self,
        name: str,
        kind: Kind,
        parent: Any,
        links: Sequence[Any],
        attributes: Mapping[str, Any],
    ) -> OtelSpan:
        its = self._with(parent, links, attributes)
        return OtelSpan(
            self._tracer.start_span(name, kind=_KINDS[kind], start_time=tracing.now_ns(), **its)
        )

    def record(
        self,
        name: str,
        times_ns: tuple[int, int],
        parent: Any,
        links: Sequence[Any],
        attributes: Mapping[str, Any],
    ) -> OtelSpan:
        its = self._with(parent, links, attributes)
        span = self._tracer.start_span(name, start_time=times_ns[0], **its)
        span.end(times_ns[1])
        return OtelSpan(span)

    def _with(
        self, parent: Any, links: Sequence[Any], attributes: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Arguments of the SDK's start_span."""
        return {
            "context": None if parent is None else _context(parent),
            "attributes": _named(attributes),
            "links": [Link(its.otel.get_span_context()) for its in links],
            "record_exception": False,  # messages and stack traces may quote a request
            "set_status_on_exception": False,
        }

    @contextmanager
    def use(self, span: Any) -> Iterator[None]:
        token = context_api.attach(trace.set_span_in_context(span.otel))
        try:
            yield
        finally:
            context_api.detach(token)

    def unsampled(self) -> OtelSpan:
        ids = self._ids
        known = SpanContext(ids.generate_trace_id(), ids.generate_span_id(), is_remote=False)
        return OtelSpan(NonRecordingSpan(known))

    def current(self) -> OtelSpan | None:
        span = trace.get_current_span()
        return OtelSpan(span) if span.get_span_context().trace_flags.sampled else None

    def current_trace_id(self) -> str | None:
        known = trace.get_current_span().get_span_context()
        return trace.format_trace_id(known.trace_id) if known.trace_flags.sampled else None

    def inject(self, span: Any) -> Pairs:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, None if span is None else _context(span))
        return tuple(carrier.items())

    def extract(self, pairs: Iterable[tuple[str, str | bytes]]) -> OtelSpan | None:
        carrier = {key: value for key, value in pairs if key in _FIELDS and isinstance(value, str)}
        if not carrier:
            return None
        span = trace.get_current_span(self._propagator.extract(carrier, Context()))
        return OtelSpan(span) if span.get_span_context().is_valid else None

    def shut_down(self) -> None:
        # A collector that does not answer must not hold up the end of the process for longer.
        ending = threading.Thread(target=self._provider.shutdown, name="kleash-trace", daemon=True)
        ending.start()
        ending.join(SHUT_DOWN_S)


class _Root(Sampler):
    """For spans without a parent: steps of a trainer, and a share of the rest."""

    def __init__(self, sample_ratio: float) -> None:
        self._rest = TraceIdRatioBased(sample_ratio)

    def should_sample(  # noqa: PLR0917 (the SDK's signature)
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Any = None,
        trace_state: Any = None,
    ) -> SamplingResult:
        if attributes and STEP in attributes:
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)
        return self._rest.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        return f"Steps,{self._rest.get_description()}"


def _context(span: OtelSpan) -> Context:
    return trace.set_span_in_context(span.otel, Context())


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {key if "." in key else f"kleash.{key}": value for key, value in attributes.items()}
