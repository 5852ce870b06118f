"""The guard around every gRPC call.

Health passes untouched: probes must not depend on any of this, and they would drown the figures of
real calls. Reflection passes too, for callers who may call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any

import grpc

from kleash.base import metrics
from kleash.rpc.errors import ServiceError, trailing_metadata
from kleash.rpc.guard import OTHER, UNKNOWN, Behavior, Guard, Guards, Labels, kind_of, respond
from kleash.rpc.health import HEALTH_SERVICE

# A caller that has not read for this long is not told why its stream ends.
SETTLE_S = 10.0


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of the hosted services."""

    def __init__(self, guards: Guards) -> None:
        self._guards = guards
        self._wrapped: dict[str, tuple[grpc.RpcMethodHandler, grpc.RpcMethodHandler]] = {}

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
        is_hosted = service in self._guards.services
        try:
            await self._guards.check_token(service, handler_call_details.invocation_metadata)
        except ServiceError as error:
            is_known = handler is not None and is_hosted
            labels = (kind_of(handler), service, method) if is_known else UNKNOWN
            return self._refuse(error, labels)
        try:
            self._guards.check_loaded(service)
        except ServiceError as error:
            return self._refuse(error)
        if handler is None:
            metrics.GRPC_STARTED.labels(OTHER, OTHER, OTHER).inc()
            metrics.GRPC_HANDLED.labels(OTHER, OTHER, OTHER, "UNIMPLEMENTED").inc()
            return None
        if not is_hosted:
            return self._behind_gate(handler, self._guards.label(service))
        known = self._wrapped.get(path)
        if known is None or known[0] is not handler:
            known = self._wrapped[path] = (handler, self._wrap(handler, service, method))
        return known[1]

    def _wrap(
        self, handler: grpc.RpcMethodHandler, service: str, method: str
    ) -> grpc.RpcMethodHandler:
        behavior, make = _parts(handler)
        assert behavior is not None, f"{service}/{method} has no handler"
        # gRPC would parse before anybody could ask who sends it and how much it holds.
        parse = _observing(
            metrics.GRPC_RECEIVED_BYTES.labels(service, method),
            handler.request_deserializer,
            is_before=True,
        )
        guard = self._guards.guard(handler, service, method, parse=parse)
        around = _stream if handler.response_streaming else _unary
        return make(
            around(guard, behavior),
            request_deserializer=None,
            response_serializer=_observing(
                metrics.GRPC_SENT_BYTES.labels(service, method),
                handler.response_serializer,
                is_before=False,
            ),
        )

    def _behind_gate(self, handler: grpc.RpcMethodHandler, label: str) -> grpc.RpcMethodHandler:
        """The handler of reflection, for peers who may call."""
        gate = self._guards.gate
        if not gate.knows_peers:
            return handler
        behavior: Behavior | None = handler.stream_stream
        assert behavior is not None, "only reflection, a stream, is served beside the services"

        async def handle(requests: Any, context: Any) -> AsyncIterable[Any]:
            try:
                gate.check_peer(label, context)
            except ServiceError as error:
                await abort(context, error)
            async for response in behavior(requests, context):
                yield response

        return grpc.stream_stream_rpc_method_handler(
            handle, handler.request_deserializer, handler.response_serializer
        )

    def _refuse(self, error: ServiceError, labels: Labels | None = None) -> grpc.RpcMethodHandler:
        """A handler that answers ``error`` to any call of any kind, and reads nothing of it.

        With ``labels`` the metrics count the call, and the audit may name it.
        """

        async def handle(_requests: Any, context: Any) -> None:
            if labels is not None:
                self._guards.record_refusal(error, labels, context.peer())
            await abort(context, error)

        return grpc.stream_stream_rpc_method_handler(handle)


def _unary(guard: Guard, behavior: Behavior) -> Behavior:
    """Around a handler that returns its response."""

    async def handle(request: Any, context: Any) -> Any:
        async def call() -> Any:
            received = await guard.reception.request(request, context)
            return await behavior(received, context)

        try:
            return await guard.run(call, context)
        except ServiceError as answer:
            await abort(context, answer)

    return handle


def _stream(guard: Guard, behavior: Behavior) -> Behavior:
    """Around a handler that yields its responses, or writes them itself."""

    async def handle(request: Any, context: Any) -> None:
        writes = _Writes(context)

        async def call() -> None:
            received = await guard.reception.request(request, context)
            await respond(behavior, received, writes)

        try:
            await guard.run(call, context)
        except ServiceError as answer:
            await writes.settle()
            await abort(context, answer)

    return handle


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


async def abort(context: Any, error: ServiceError) -> None:
    """End the call with the status, details and trailers of ``error``."""
    await context.abort(error.code, error.message, trailing_metadata=trailing_metadata(error))


def _observing(
    histogram: Any, convert: Callable[[Any], Any] | None, *, is_before: bool
) -> Callable[[Any], Any]:
    """``convert`` between bytes and message, observing the number of bytes."""

    def observe(value: Any) -> Any:
        converted = convert(value) if convert is not None else value
        histogram.observe(len(value if is_before else converted))
        return converted

    return observe


def _parts(handler: grpc.RpcMethodHandler) -> tuple[Behavior | None, Callable[..., Any]]:
    """The function of a handler, and what makes a handler of its kind."""
    if handler.request_streaming:
        if handler.response_streaming:
            return handler.stream_stream, grpc.stream_stream_rpc_method_handler
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler
