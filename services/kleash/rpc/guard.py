"""What the chassis does around every call, whatever carries it: gRPC or HTTP.

    Guards, one per server        a Guard, one per method
    knows the caller ─► is loaded ─► quota ─► parse ─► handler ─► status, metrics, audit line
                                   └─────────── within the time cap ──────────┘

A call's context is a grpc.aio.ServicerContext, or what the gateway gives in its place.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from kleash.base import metrics
from kleash.base.errors import ModelError, UserError
from kleash.base.exemplar import current_exemplar
from kleash.base.tracing import Span
from kleash.rpc import audit
from kleash.rpc.auth import Gate, caller
from kleash.rpc.call_spans import note_status, serving
from kleash.rpc.deadline import set_remaining_s
from kleash.rpc.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    PreconditionFailed,
    ServiceError,
    Unavailable,
    Unimplemented,
)
from kleash.rpc.quota import Quotas
from kleash.rpc.reception import Reception, descriptor_of

logger = logging.getLogger(__name__)

OTHER = "other"

Behavior = Callable[[Any, Any], Any]
"""A handler: of the request, or an iterator of them, and the context."""
Labels = tuple[str, str, str]
"""Kind, service and method, as the metrics name them."""
UNKNOWN: Labels = (OTHER, OTHER, OTHER)


class Guards:
    """The rules of one server for all of its calls."""

    def __init__(
        self,
        services: tuple[str, ...],
        gate: Gate,
        *,
        quotas: Quotas,
        audits: audit.Audits,
        max_request_s: float,
    ) -> None:
        self.services = frozenset(services)
        self.gate = gate
        self.audits = audits
        self._quotas = quotas
        self._max_request_s = max_request_s
        self._loading = frozenset(services)

    def mark_loaded(self, services: tuple[str, ...]) -> None:
        """From now on calls reach these services."""
        self._loading -= frozenset(services)

    def label(self, service: str) -> str:
        """``service`` as the metric of refused calls names it."""
        return service.split(".")[1] if service in self.services else OTHER

    async def check_token(
        self, service: str, metadata: Iterable[tuple[str, str | bytes]] | None
    ) -> None:
        """Raises ServiceError for a token that does not let the call in."""
        await self.gate.check_token(self.label(service), metadata or ())

    def check_loaded(self, service: str) -> None:
        """Raises Unavailable as long as ``service`` has not been loaded."""
        if service in self._loading:
            raise Unavailable(f"{service} is still loading; try again.", reason="LOADING")

    def guard(
        self,
        handler: grpc.RpcMethodHandler,
        service: str,
        method: str,
        *,
        parse: Callable[[bytes], Any],
    ) -> Guard:
        """Of the calls of one method; ``parse`` makes a request of the bytes that carry it."""
        label = self.label(service)
        reception = Reception(
            label,
            f"{service}/{method}",
            check=functools.partial(self.gate.check_peer, label),
            quotas=self._quotas,
            parse=parse,
            descriptor=descriptor_of(handler.request_deserializer),
            is_streaming=handler.request_streaming,
            audits_text=self.audits.text,
        )
        labels = (kind_of(handler), service, method)
        return Guard(labels, self._max_request_s, reception, audits=self.audits.calls)

    def record_refusal(self, error: ServiceError, labels: Labels, peer: str) -> None:
        """Count a call that was refused before its guard saw it, and write its line."""
        metrics.GRPC_STARTED.labels(*labels).inc()
        metrics.GRPC_HANDLED.labels(*labels, error.code.name).inc()
        if self.audits.calls:
            audit.record(
                caller=caller(),
                peer=peer,
                method="/".join(labels[1:]),
                code=error.code,
                reason=error.reason,
                seconds=0.0,
            )


class Guard:
    """Counts, times, caps and translates the calls of one method."""

    def __init__(
        self, labels: Labels, max_request_s: float, reception: Reception, *, audits: bool
    ) -> None:
        self.reception = reception
        self._started = metrics.GRPC_STARTED.labels(*labels)
        self._seconds = metrics.GRPC_HANDLING_SECONDS.labels(*labels)
        self._labels = labels
        self._max_request_s = max_request_s
        self._audits = audits

    async def run(self, call: Callable[[], Awaitable[Any]], context: Any) -> Any:
        """What ``call`` returns. Raises ServiceError, the answer to whatever it raised."""
        with serving(self._method, context) as span:
            return await self._run(call, context, span)

    async def _run(self, call: Callable[[], Awaitable[Any]], context: Any, span: Span) -> Any:
        self._started.inc()
        facts = audit.expect()
        began = time.monotonic()
        code, reason = grpc.StatusCode.OK, ""
        allowed = context.time_remaining()
        set_remaining_s(
            self._max_request_s if allowed is None else min(allowed, self._max_request_s)
        )
        try:
            return await self._within_the_cap(call)
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
            raise Unimplemented(f"this server does not offer {self._method}.") from None
        except Exception as error:
            answer = as_service_error(error, self._method)
            code, reason = answer.code, answer.reason
            if answer is error:
                raise
            raise answer from error
        finally:
            self.reception.quotas.end()
            seconds = time.monotonic() - began
            metrics.GRPC_HANDLED.labels(*self._labels, code.name).inc()
            self._seconds.observe(seconds, current_exemplar())
            note_status(span, code)
            if self._audits:
                audit.record(
                    caller=caller(),
                    peer=context.peer(),
                    method=self._method,
                    code=code,
                    reason=reason,
                    seconds=seconds,
                    facts=facts,
                )

    @property
    def _method(self) -> str:
        return "/".join(self._labels[1:])

    async def _within_the_cap(self, call: Callable[[], Awaitable[Any]]) -> Any:
        cap = asyncio.timeout(self._max_request_s)
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


async def respond(behavior: Behavior, requests: Any, context: Any) -> None:
    """Run a handler that yields its responses, or writes them itself, to its end."""
    responses: AsyncIterable[Any] | Awaitable[None] = behavior(requests, context)
    if inspect.isawaitable(responses):
        await responses
        return
    try:
        async for response in responses:
            await context.write(response)
    finally:
        # A caller that leaves ends the generator now, not at garbage collection.
        await responses.aclose()  # type: ignore[attr-defined]


def kind_of(handler: grpc.RpcMethodHandler) -> str:
    """As the metrics name it."""
    if handler.request_streaming:
        return "bidi_stream" if handler.response_streaming else "client_stream"
    return "server_stream" if handler.response_streaming else "unary"


def _abort_code(context: Any) -> grpc.StatusCode:
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next(
        (status for status in grpc.StatusCode if status.value[0] == code), grpc.StatusCode.UNKNOWN
    )
