"""What the chassis does around every call: who calls, metrics, errors as statuses, the time cap.

Health passes untouched: probes must not depend on any of this, and they would drown the figures of
real calls. Reflection passes too, for callers who may call.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kleash.base import metrics
from kleash.base.errors import ModelError, UserError
from kleash.rpc import audit
from kleash.rpc.auth import Gate, caller
from kleash.rpc.deadline import set_remaining_s
from kleash.rpc.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    PreconditionFailed,
    ServiceError,
    Unavailable,
    trailing_metadata,
)
from kleash.rpc.health import HEALTH_SERVICE
from kleash.rpc.quota import Quotas
from kleash.rpc.reception import Reception, descriptor_of

logger = logging.getLogger(__name__)

OTHER = "other"
# A caller that has not read for this long is not told why its stream ends.
SETTLE_S = 10.0

Behavior = Callable[[Any, Any], Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of the hosted services."""

    def __init__(
        self,
        services: tuple[str, ...],
        gate: Gate,
        *,
        quotas: Quotas,
        audits: audit.Audits,
        max_request_s: float,
    ) -> None:
        self._services = frozenset(services)
        self._gate = gate
        self._quotas = quotas
        self._audits = audits
        self._max_request_s = max_request_s
        self._wrapped: dict[str, tuple[grpc.RpcMethodHandler, grpc.RpcMethodHandler]] = {}
        self._loading = frozenset(services)

    def mark_loaded(self, services: tuple[str, ...]) -> None:
        """From now on calls reach these services."""
        self._loading -= frozenset(services)

    async def intercept_service(  # type: ignore[override]
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """The handler of a call, wrapped."""
        path: str = handler_call_details.method
        service, _, method = path.removeprefix("/").rpartition("/")
        handler: grpc.RpcMethodHandler | None = await continuation(handler_call_details)
        if service == HEALTH_SERVICE:
            return handler
        label = service.split(".")[1] if service in self._services else OTHER
        try:
            await self._gate.check_token(label, handler_call_details.invocation_metadata or ())
        except ServiceError as error:
            is_hosted = handler is not None and service in self._services
            labels = (_kind(handler), service, method) if is_hosted else (OTHER,) * 3
            return _refuse(error, labels, audits=self._audits.calls)
        if service in self._loading:
            return _refuse(Unavailable(f"{service} is still loading; try again.", reason="LOADING"))
        if handler is None:
            metrics.GRPC_STARTED.labels(OTHER, OTHER, OTHER).inc()
            metrics.GRPC_HANDLED.labels(OTHER, OTHER, OTHER, "UNIMPLEMENTED").inc()
            return None
        if service not in self._services:
            return self._behind_gate(handler, label)
        known = self._wrapped.get(path)
        if known is None or known[0] is not handler:
            known = self._wrapped[path] = (handler, self._wrap(handler, service, method, label))
        return known[1]

    def _wrap(
        self, handler: grpc.RpcMethodHandler, service: str, method: str, label: str
    ) -> grpc.RpcMethodHandler:
        behavior, make = _parts(handler)
        assert behavior is not None, f"{service}/{method} has no handler"
        parse = _observing(
            metrics.GRPC_RECEIVED_BYTES.labels(service, method),
            handler.request_deserializer,
            is_before=True,
        )
        reception = Reception(
            label,
            f"{service}/{method}",
            check=functools.partial(self._gate.check_peer, label),
            quotas=self._quotas,
            # gRPC would parse before anybody could ask who sends it and how much it holds.
            parse=parse,
            descriptor=descriptor_of(handler.request_deserializer),
            is_streaming=handler.request_streaming,
            audits_text=self._audits.text,
        )
        labels = (_kind(handler), service, method)
        guard = _Guard(labels, self._max_request_s, reception, audits=self._audits.calls)
        around = guard.stream if handler.response_streaming else guard.unary
        return make(
            around(behavior),
            request_deserializer=None,
            response_serializer=_observing(
                metrics.GRPC_SENT_BYTES.labels(service, method),
                handler.response_serializer,
                is_before=False,
            ),
        )

    def _behind_gate(self, handler: grpc.RpcMethodHandler, label: str) -> grpc.RpcMethodHandler:
        """The handler of reflection, for peers who may call."""
        if not self._gate.knows_peers:
            return handler
        behavior: Behavior | None = handler.stream_stream
        assert behavior is not None, "only reflection, a stream, is served beside the services"

        async def handle(requests: Any, context: Any) -> AsyncIterable[Any]:
            try:
                self._gate.check_peer(label, context)
            except ServiceError as error:
                await abort(context, error)
            async for response in behavior(requests, context):
                yield response

        return grpc.stream_stream_rpc_method_handler(
            handle, handler.request_deserializer, handler.response_serializer
        )


class _Guard:
    """Receives, counts, times, caps and translates the calls of one method."""

    def __init__(
        self,
        labels: tuple[str, str, str],
        max_request_s: float,
        reception: Reception,
        *,
        audits: bool,
    ) -> None:
        self._started = metrics.GRPC_STARTED.labels(*labels)
        self._seconds = metrics.GRPC_HANDLING_SECONDS.labels(*labels)
        self._labels = labels
        self._max_request_s = max_request_s
        self._reception = reception
        self._audits = audits

    def unary(self, behavior: Behavior) -> Behavior:
        """Around a handler that returns its response."""

        async def handle(request: Any, context: Any) -> Any:
            async def call() -> Any:
                received = await self._reception.request(request, context)
                return await behavior(received, context)

            return await self._run(call, context)

        return handle

    def stream(self, behavior: Behavior) -> Behavior:
        """Around a handler that yields its responses, or writes them itself."""

        async def handle(request: Any, context: Any) -> None:
            writes = _Writes(context)

            async def call() -> None:
                received = await self._reception.request(request, context)
                responses: AsyncIterable[Any] | Awaitable[None] = behavior(received, writes)
                if inspect.isawaitable(responses):
                    await responses
                    return
                try:
                    async for response in responses:
                        await writes.write(response)
                finally:
                    # A caller that leaves ends the generator now, not at garbage collection.
                    await responses.aclose()  # type: ignore[attr-defined]

            await self._run(call, context, writes.settle)

        return handle

    async def _run(
        self,
        call: Callable[[], Awaitable[Any]],
        context: Any,
        before_abort: Callable[[], Awaitable[None]] | None = None,
    ) -> Any:
        self._started.inc()
        facts = audit.expect()
        began = time.monotonic()
        code, reason = grpc.StatusCode.OK, ""
        allowed = context.time_remaining()
        set_remaining_s(
            self._max_request_s if allowed is None else min(allowed, self._max_request_s)
        )
        cap = asyncio.timeout(self._max_request_s)
        try:
            try:
                async with cap:
                    return await call()
            except TimeoutError as error:
                if not cap.expired():
                    raise
                raise DeadlineExceeded(
                    f"the call took longer than the {self._max_request_s:g} s that this server "
                    "allows; send less in one request.",
                    reason="SERVER_TIME_LIMIT",
                ) from error
        except asyncio.CancelledError:
            left = context.time_remaining()
            is_late = left is not None and left <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = _abort_code(context)
            raise
        except NotImplementedError:
            # What a generated servicer raises for a method that the service does not override.
            code = grpc.StatusCode.UNIMPLEMENTED
            await context.abort(code, f"this server does not offer {'/'.join(self._labels[1:])}.")
        except Exception as error:
            answer = as_service_error(error, "/".join(self._labels[1:]))
            code, reason = answer.code, answer.reason
            if before_abort is not None:
                await before_abort()
            await abort(context, answer)
        finally:
            self._reception.quotas.end()
            seconds = time.monotonic() - began
            metrics.GRPC_HANDLED.labels(*self._labels, code.name).inc()
            self._seconds.observe(seconds)
            if self._audits:
                audit.record(
                    caller=caller(),
                    peer=context.peer(),
                    method=self._reception.method,
                    code=code,
                    reason=reason,
                    seconds=seconds,
                    facts=facts,
                )


class _Writes:
    """A servicer context whose writes are one at a time and whole, whoever is cancelled.

    gRPC goes on with a write whose task was cancelled, and refuses a status beside it: the caller
    would wait for ever. So a write outlives its task, and ``settle`` waits for it.
    """

    def __init__(self, context: Any) -> None:
        self._context = context
        self._one_at_a_time = asyncio.Lock()
        self._open: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        """Send ``message``."""
        task = asyncio.ensure_future(self._write(message))
        self._open.add(task)
        task.add_done_callback(self._forget)
        await asyncio.shield(task)

    async def settle(self) -> None:
        """Wait for writes in flight, while the caller still reads."""
        if self._open:
            await asyncio.wait(self._open, timeout=SETTLE_S)

    async def _write(self, message: Any) -> None:
        async with self._one_at_a_time:
            await self._context.write(message)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        if not task.cancelled():
            task.exception()  # seen, when nobody waits for the write any more


def as_service_error(error: Exception, method: str) -> ServiceError:
    """What the caller of ``method`` is told; an unexpected error is logged and told by id alone."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, ModelError):
        return PreconditionFailed(str(error), reason="MODEL")
    if isinstance(error, UserError):
        return InvalidRequest(str(error))
    if isinstance(error, DecodeError):
        return InvalidRequest(
            f"the message is not a request of {method}; use the protos of this server's version."
        )
    correlation_id = uuid.uuid4().hex[:12]
    logger.error("%s failed, correlation id %s", method, correlation_id, exc_info=error)
    return InternalError(
        f"internal error in {method}; the server's log explains it under id {correlation_id}.",
        reason="INTERNAL",
        metadata={"correlation_id": correlation_id},
    )


async def abort(context: Any, error: ServiceError) -> None:
    """End the call with the status, details and trailers of ``error``."""
    await context.abort(error.code, error.message, trailing_metadata=trailing_metadata(error))


def _abort_code(context: Any) -> grpc.StatusCode:
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next(
        (status for status in grpc.StatusCode if status.value[0] == code), grpc.StatusCode.UNKNOWN
    )


def _observing(
    histogram: Any, convert: Callable[[Any], Any] | None, *, is_before: bool
) -> Callable[[Any], Any]:
    """``convert`` between bytes and message, observing the number of bytes."""

    def observe(value: Any) -> Any:
        converted = convert(value) if convert is not None else value
        histogram.observe(len(value if is_before else converted))
        return converted

    return observe


def _kind(handler: grpc.RpcMethodHandler) -> str:
    if handler.request_streaming:
        return "bidi_stream" if handler.response_streaming else "client_stream"
    return "server_stream" if handler.response_streaming else "unary"


def _parts(handler: grpc.RpcMethodHandler) -> tuple[Behavior | None, Callable[..., Any]]:
    """The function of a handler, and what makes a handler of its kind."""
    if handler.request_streaming:
        if handler.response_streaming:
            return handler.stream_stream, grpc.stream_stream_rpc_method_handler
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler


def _refuse(
    error: ServiceError, labels: tuple[str, ...] | None = None, *, audits: bool = False
) -> grpc.RpcMethodHandler:
    """A handler that answers ``error`` to any call of any kind, and reads nothing of it.

    With ``labels`` the metrics count the call, and the audit may name it.
    """

    async def handle(_requests: Any, context: Any) -> None:
        if labels is not None:
            metrics.GRPC_STARTED.labels(*labels).inc()
            metrics.GRPC_HANDLED.labels(*labels, error.code.name).inc()
            if audits:
                audit.record(
                    caller=caller(),
                    peer=context.peer(),
                    method="/".join(labels[1:]),
                    code=error.code,
                    reason=error.reason,
                    seconds=0.0,
                )
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)
