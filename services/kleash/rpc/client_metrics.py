"""Counts and times the calls of this process's clients, where it asks for that.

KLEASH_CLIENT_METRICS   1 for metrics of calls in prometheus_client's default registry

They are off by default, and a client without them does not load prometheus_client. What they are
is in kleash.base.client_metrics.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from kleash.base.errors import ConfigError
from kleash.base.exemplar import current_exemplar

VARIABLE = "KLEASH_CLIENT_METRICS"

_is_enabled = False


def enable() -> None:
    """Count the calls of every client that is made from now on.

    Raises ConfigError without prometheus_client.
    """
    global _is_enabled  # noqa: PLW0603
    _metrics()
    _is_enabled = True


def are_on() -> bool:
    """Whether this process asked for them. Raises ConfigError for a variable that says neither."""
    said = os.environ.get(VARIABLE, "").strip()
    if said not in ("", "0", "1"):
        raise ConfigError(f"{VARIABLE} is {said!r}; set it to 1 for metrics of calls, or to 0.")
    return _is_enabled or said == "1"


def counted(channel: grpc.Channel) -> grpc.Channel:
    """``channel``, with its calls counted where that is wanted."""
    return grpc.intercept_channel(channel, _Interceptor()) if are_on() else channel


def counted_aio(channel: grpc.aio.Channel) -> Any:
    """``channel`` as a stub takes it, with its calls counted where that is wanted."""
    return _AioChannel(channel) if are_on() else channel


def count_retry(service: str, method: str) -> None:
    """A client calls once more, after the wait that a busy service asked for."""
    if are_on():
        _metrics().CLIENT_RETRIES.labels(service, method).inc()


@functools.cache
def _metrics() -> Any:
    try:
        from kleash.base import client_metrics  # not at import: a client is light
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        raise ConfigError(
            "metrics of calls need prometheus_client, which is not installed; install it with "
            f"pip install prometheus-client, or unset {VARIABLE}."
        ) from None
    return client_metrics


class _Counted:
    """One call, from its start."""

    def __init__(self, kind: str, path: str | bytes) -> None:
        name = path.decode() if isinstance(path, bytes) else path
        service, _, method = name.removeprefix("/").rpartition("/")
        self._labels = (kind, service, method)
        self._exemplar = current_exemplar()
        _metrics().CLIENT_STARTED.labels(*self._labels).inc()
        self._began = time.monotonic()

    def end(self, code: grpc.StatusCode) -> None:
        """The call has its status."""
        seconds = time.monotonic() - self._began
        _metrics().CLIENT_HANDLED.labels(*self._labels, code.name).inc()
        _metrics().CLIENT_HANDLING_SECONDS.labels(*self._labels).observe(seconds, self._exemplar)

    def end_with(self, call: Any) -> None:
        """A call with threads is over."""
        self.end(call.code())


@contextmanager
def _ends_if_raised(counted: _Counted) -> Iterator[None]:
    """A call that never came to be, or that the process itself broke off, is over, too."""
    try:
        yield
    except BaseException:
        counted.end(grpc.StatusCode.CANCELLED)
        raise


class _Interceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Of a channel with threads."""

    def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        return _call("unary", continuation, client_call_details, request)

    def intercept_unary_stream(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        return _call("server_stream", continuation, client_call_details, request)

    def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return _call("client_stream", continuation, client_call_details, request_iterator)

    def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return _call("bidi_stream", continuation, client_call_details, request_iterator)


def _call(kind: str, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
    counted = _Counted(kind, details.method)
    with _ends_if_raised(counted):
        call = continuation(details, request)
    call.add_done_callback(counted.end_with)
    return call


class _AioChannel:
    """What a stub needs of a channel. Interceptors of grpc.aio would put calls of their own in the
    place of gRPC's, which cancel otherwise."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.unary_unary = _counting("unary", channel.unary_unary)
        self.unary_stream = _counting("server_stream", channel.unary_stream)
        self.stream_unary = _counting("client_stream", channel.stream_unary)
        self.stream_stream = _counting("bidi_stream", channel.stream_stream)


def _counting(kind: str, make: Callable[..., Any]) -> Callable[..., Any]:
    def method(path: str, *arguments: Any, **keywords: Any) -> Callable[..., Any]:
        begin = make(path, *arguments, **keywords)

        def call(*given: Any, **options: Any) -> Any:
            counted = _Counted(kind, path)
            with _ends_if_raised(counted):
                begun = begin(*given, **options)
            begun.add_done_callback(functools.partial(_end_soon, counted))
            return begun

        return call

    return method


_ending: set[asyncio.Task[None]] = set()
"""Held here until they are done: the event loop alone would forget them."""


def _end_soon(counted: _Counted, call: Any) -> None:
    async def end() -> None:
        counted.end(await call.code())

    task = asyncio.ensure_future(end())
    _ending.add(task)
    task.add_done_callback(_ending.discard)
