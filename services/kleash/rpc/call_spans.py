"""Spans of calls, on both sides, named as OpenTelemetry's conventions for RPC name them.

client_call ──traceparent in the metadata──► serving    (in a header where the call is HTTP)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grpc

from kleash.base import tracing
from kleash.base.tracing import Pairs, Span
from kleash.rpc.errors import ServiceError


@contextmanager
def client_call(service: str, method: str, address: str) -> Iterator[Pairs]:
    """Measure a call that is part of a trace; yields the metadata that carries the trace on.

    The span is not the current one in the block, so that a generator may yield in it. A call that
    belongs to no trace begins none: a watch that lasts for hours is nobody's step.
    """
    if tracing.current() is None:
        yield tracing.inject()
        return
    host, _, port = address.removeprefix("dns:///").rpartition(":")
    names = _names(service, method) | {"server.address": host or address, "server.port": port}
    span = tracing.open_span(f"{service}/{method}", kind="client")
    span.note(**names)
    code = grpc.StatusCode.CANCELLED  # what leaves the block early has given the call up
    try:
        yield tracing.inject(span)
        code = grpc.StatusCode.OK
    except ServiceError as error:
        code = error.code
        raise
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        raise
    finally:
        note_status(span, code)
        span.end()


def serving(method: str, context: Any) -> AbstractContextManager[Span]:
    """Measure the handling of a call of ``method`` ("kleash.reward.v1.RewardService/Score")."""
    if not tracing.is_on():
        return tracing.span(method)
    caller = tracing.extract(context.invocation_metadata())
    return tracing.span(method, kind="server", parent=caller, **_names(*method.split("/")))


def note_status(span: Span, code: grpc.StatusCode) -> None:
    """How a call ended; any other status than OK marks the span as failed."""
    span.note(**{"rpc.grpc.status_code": code.value[0]})
    if code != grpc.StatusCode.OK:
        span.fail(code.name)


def _names(service: str, method: str) -> dict[str, Any]:
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
