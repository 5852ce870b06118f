"""The one face of Kleash to OpenTelemetry: spans, and the W3C trace context between processes.

Off until ``install``; until then nothing of OpenTelemetry is imported, and each function here
returns at once. ``trace_setup.py`` turns it on; ``trace_recorder.py`` does the work then.

Times are nanoseconds of Unix time by ``now_ns``. Attributes hold numbers, names and identifiers;
never what a request or a response says. A key without a dot is ours: ``step`` becomes
``kleash.step``.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, Self, TypeVar

Kind = Literal["internal", "client", "server"]
Pairs = tuple[tuple[str, str], ...]
"""Metadata of gRPC, or headers of HTTP."""

F = TypeVar("F", bound=Callable[..., Any])

# Wall time that never goes back: the spans of a process must nest.
_EPOCH_NS = time.time_ns() - time.monotonic_ns()


class Span(Protocol):
    """A piece of work that is being measured, or nothing."""

    def note(self, **attributes: Any) -> None:
        """Add attributes."""
        ...

    def fail(self, kind: str) -> None:
        """Mark as failed, by the name of an error's type or of a status; never its message."""
        ...

    def end(self) -> None:
        """End it now; for those of ``open_span``."""
        ...


class Recorder(Protocol):
    """What ``install`` gets: the functions below, while tracing is on."""

    def open_span(
        self,
        name: str,
        kind: Kind,
        parent: Span | None,
        links: Sequence[Span],
        attributes: Mapping[str, Any],
    ) -> Span:
        """A span that has begun."""
        ...

    def use(self, span: Span) -> AbstractContextManager[Any]:
        """Make a span the current one."""
        ...

    def record(
        self,
        name: str,
        times_ns: tuple[int, int],
        parent: Span,
        links: Sequence[Span],
        attributes: Mapping[str, Any],
    ) -> Span:
        """A span that is over."""
        ...

    def unsampled(self) -> Span:
        """A root that is not recorded, and whose children are not, in whatever process."""
        ...

    def current(self) -> Span | None:
        """The current span when it is recorded."""
        ...

    def current_trace_id(self) -> str | None:
        """32 hex digits."""
        ...

    def inject(self, span: Span | None) -> Pairs:
        """A span, or else the current one, for another process."""
        ...

    def extract(self, pairs: Iterable[tuple[str, str | bytes]]) -> Span | None:
        """The span of another process."""
        ...

    def shut_down(self) -> None:
        """Write what has been recorded."""
        ...


class _NoSpan:
    """Of a process that does not trace; also the context manager that yields it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        return

    def note(self, **attributes: Any) -> None:  # noqa: ARG002
        return

    def fail(self, kind: str) -> None:  # noqa: ARG002
        return

    def end(self) -> None:
        return


_NO_SPAN: Any = _NoSpan()
_recorder: Recorder | None = None


def install(recorder: Recorder) -> None:
    """Trace with ``recorder`` from now on."""
    global _recorder  # noqa: PLW0603
    assert _recorder is None, "tracing is on already; shut_down() first"
    _recorder = recorder


def shut_down() -> None:
    """Write what has been recorded, and trace no more."""
    global _recorder
    if _recorder is not None:
        recorder, _recorder = _recorder, None
        recorder.shut_down()


def is_on() -> bool:
    """Whether this process traces."""
    return _recorder is not None


def now_ns() -> int:
    """Unix time, which never goes back within a process."""
    return _EPOCH_NS + time.monotonic_ns()


def at_ns(monotonic_s: float) -> int:
    """The time of ``now_ns`` at which ``time.monotonic()`` was ``monotonic_s``."""
    return _EPOCH_NS + int(monotonic_s * 1e9)


def current_trace_id() -> str | None:
    """32 hex digits of the trace that the current span is recorded in, else None."""
    return None if _recorder is None else _recorder.current_trace_id()


def current() -> Span | None:
    """The current span when it is recorded, else None: a parent for work in other threads."""
    return None if _recorder is None else _recorder.current()


def bound(function: F) -> F:
    """``function`` as a child of the current span, in whatever thread it runs."""
    if _recorder is None or (span := _recorder.current()) is None:
        return function

    def run(*arguments: Any, **keywords: Any) -> Any:
        with use(span):
            return function(*arguments, **keywords)

    return run  # type: ignore[return-value]


def span(
    name: str,
    *,
    kind: Kind = "internal",
    parent: Span | None = None,
    links: Sequence[Span] = (),
    **attributes: Any,
) -> AbstractContextManager[Span]:
    """Measure the block as a child of ``parent``, or else of the current span.

    An exception that leaves the block marks the span as failed, by the name of its type alone.
    """
    if _recorder is None:
        return _NO_SPAN
    return _measured(_recorder, _recorder.open_span(name, kind, parent, links, attributes))


def measured(name: str) -> Callable[[F], F]:
    """Decorates a function: each call of it is a span."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*arguments: Any, **keywords: Any) -> Any:
            with span(name):
                return function(*arguments, **keywords)

        return run  # type: ignore[return-value]

    return decorate


def root_span(
    name: str, *, is_sampled: bool, step: int, **attributes: Any
) -> AbstractContextManager[Span]:
    """Measure the block as a trace of its own; unless ``is_sampled``, nothing of it is recorded."""
    if _recorder is None:
        return _NO_SPAN
    if not is_sampled:
        return _measured(_recorder, _recorder.unsampled())
    return span(name, step=step, **attributes)


def open_span(
    name: str, *, kind: Kind = "internal", parent: Span | None = None, **attributes: Any
) -> Span:
    """A span that lasts until its ``end``, and is not the current one meanwhile."""
    if _recorder is None:
        return _NO_SPAN
    return _recorder.open_span(name, kind, parent, (), attributes)


def use(span: Span) -> AbstractContextManager[Any]:
    """Make a span the current one in the block."""
    return _NO_SPAN if _recorder is None else _recorder.use(span)


def record_span(
    name: str,
    start_ns: int,
    end_ns: int,
    *,
    parent: Span | None,
    links: Sequence[Span] = (),
    **attributes: Any,
) -> Span:
    """Record work that was measured elsewhere; nothing where ``parent`` is None."""
    if _recorder is None or parent is None:
        return _NO_SPAN
    return _recorder.record(name, (start_ns, max(start_ns, end_ns)), parent, links, attributes)


def inject(span: Span | None = None) -> Pairs:
    """The W3C ``traceparent`` of ``span``, or else of the current one, for a call.

    In a process that does not trace with Kleash and traces otherwise, what its own OpenTelemetry
    says: an application's trace goes on in the services that it calls.
    """
    if _recorder is not None:
        return _recorder.inject(span)
    if (propagate := sys.modules.get("opentelemetry.propagate")) is None:
        return ()
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())


def extract(pairs: Iterable[tuple[str, str | bytes]] | None) -> Span | None:
    """The caller's span, from the metadata or headers of its call: a parent for ours."""
    return None if _recorder is None or pairs is None else _recorder.extract(pairs)


@contextmanager
def _measured(recorder: Recorder, span: Span) -> Iterator[Span]:
    try:
        with recorder.use(span):
            yield span
    except BaseException as error:
        span.fail(type(error).__name__)
        raise
    finally:
        span.end()
