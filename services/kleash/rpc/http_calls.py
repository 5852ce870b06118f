"""One call over HTTP: its context, its body, and the bytes that go back."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from aiohttp import HttpVersion11, web
from aiohttp.web_protocol import RequestPayloadError
from google.protobuf.message import Message

from kleash.base import metrics
from kleash.rpc.errors import Cancelled, DeadlineExceeded, InvalidRequest, ServiceError
from kleash.rpc.guard import Guard, respond
from kleash.rpc.http_answer import (
    MESSAGE_TOO_LARGE,
    UNSUPPORTED_MEDIA_TYPE,
    answer_json,
    error_json,
)
from kleash.rpc.http_api import Event, HttpRoute
from kleash.rpc.http_events import READER_LEFT, SLOW_READER_S, EventStream
from kleash.rpc.http_json import dump_json, parse_json, read_message, read_query, write_message
from kleash.rpc.http_tls import auth_context
from kleash.rpc.requests import TOO_LARGE

TIMEOUT_HEADERS = ("X-Request-Timeout-S", "Grpc-Timeout")
"""Seconds as a decimal number; and as gRPC over HTTP/2 and grpc-gateway write it, "250m"."""

# More is parsed and written in a thread, so that other calls go on.
LARGE_BYTES = 1 << 16
LARGE_ITEMS = 64
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)
_GRPC_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])", re.ASCII)
_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_JSON = re.compile(r"application/([\w.-]+\+)?json", re.ASCII)
_LINES = ("application/x-ndjson", "application/jsonl", "application/x-jsonlines")

T = TypeVar("T")


class HttpContext:
    """In place of a grpc.aio.ServicerContext, as far as guards and handlers use one."""

    def __init__(self, request: web.BaseRequest) -> None:
        """Raises InvalidRequest for a time limit that cannot be read."""
        self._request = request
        self._metadata = [(name.lower(), value) for name, value in request.headers.items()]
        self.timeout_s = _timeout_s(request.headers)
        self._end = None if self.timeout_s is None else time.monotonic() + self.timeout_s

    def invocation_metadata(self) -> list[tuple[str, str]]:
        """The headers, their names in small letters."""
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        """Names of the client's certificate."""
        return auth_context(self._request.get_extra_info("peercert"))

    def peer(self) -> str:
        """ "http:10.0.0.7:40312"."""
        return peer_of(self._request)

    def time_remaining(self) -> float | None:
        """Seconds until the caller's limit; None without one."""
        return None if self._end is None else self._end - time.monotonic()

    async def within_its_time(self, work: Awaitable[T]) -> T:
        """Await ``work`` until the caller's limit. Raises DeadlineExceeded."""
        cap = asyncio.timeout(self.time_remaining())
        try:
            async with cap:
                return await work
        except TimeoutError as error:
            if not cap.expired():
                raise
            raise DeadlineExceeded(
                f"the call was not answered within the {self.timeout_s:g} s that its caller "
                "allows; allow more time or send less."
            ) from error


@dataclass(frozen=True)
class HttpCall:
    """One request, let in by token; what is left is the guard's and the handler's."""

    route: HttpRoute
    handler: grpc.RpcMethodHandler
    guard: Guard
    request: web.BaseRequest
    context: HttpContext
    headers: Mapping[str, str]
    """Of the response."""
    max_bytes: int
    """Of the body, or of one line of a stream."""

    async def answer(self) -> web.StreamResponse:
        """Raises ServiceError, as long as nothing has been sent."""
        if self.route.event is not None:
            return await self._events(self.route.event)
        if self.handler.response_streaming:
            return await self._stream()
        body = await self.guard.run(lambda: self._within_its_time(self._unary), self.context)
        return answer_json(body, self.headers)

    async def _within_its_time(self, work: Callable[[], Awaitable[T]]) -> T:
        self.guard.reception.admit(self.context)
        return await self.context.within_its_time(work())

    async def _unary(self) -> bytes:
        assert self.handler.unary_unary is not None
        query = _query(self.request)
        if self.route.verb == "GET":
            read = self.route.read
            message = read(None, query) if read else read_query(self._type, query)
        else:
            _check_type(self.request, is_stream=False)
            raw = await read_body(self.request, self.max_bytes)
            message = await self._parsed(raw, query)
        self.guard.reception.note_text(message)
        context: Any = self.context
        response = await self.handler.unary_unary(message, context)
        if len(getattr(response, "results", ())) > LARGE_ITEMS:
            return await asyncio.to_thread(self._dumped, response)
        return self._dumped(response)

    async def _stream(self) -> web.StreamResponse:
        behavior = self.handler.stream_stream
        assert behavior is not None, "of streams, those in both directions have a route"
        lines = _ResponseLines(self)
        try:
            await self.guard.run(
                lambda: self._within_its_time(lambda: respond(behavior, self._messages(), lines)),
                self.context,
            )
        except ServiceError as error:
            if not lines.is_begun:
                raise
            return await lines.finished(error)
        return await lines.finished()

    async def _events(self, event_of: Callable[[Any], Event]) -> web.StreamResponse:
        behavior: Any = self.handler.unary_stream
        assert behavior is not None
        assert self.route.read is not None
        read, stream = self.route.read, EventStream(self.request, self.headers)

        async def send() -> None:
            message = read(self.request.headers.get("Last-Event-ID"), _query(self.request))
            self.guard.reception.note_text(message)
            await stream.send_all(behavior(message, self.context), event_of)

        try:
            await self.guard.run(lambda: self._within_its_time(send), self.context)
        except ServiceError as error:
            if not stream.is_begun:
                raise
            await stream.end_with(error)
        return await stream.finished()

    async def _messages(self) -> AsyncIterator[Message]:
        _check_type(self.request, is_stream=True)
        number = 0
        async for line in read_lines(self.request, self.max_bytes):
            number += 1
            if not line.strip():
                continue
            try:
                message = await self._parsed(line, _query(self.request))
            except InvalidRequest as error:
                raise InvalidRequest(
                    f"line {number}: {error.message}", reason=error.reason, field=error.field
                ) from None
            self.guard.reception.note_text(message)
            yield message

    async def _parsed(self, raw: bytes, query: Mapping[str, str]) -> Message:
        try:
            if len(raw) > LARGE_BYTES:
                return await asyncio.to_thread(self._parse, raw, query)
            return self._parse(raw, query)
        except InvalidRequest as error:
            if error.reason == TOO_LARGE:
                metrics.REQUESTS_REJECTED.labels(self.guard.reception.service, "too_large").inc()
            raise

    def _parse(self, raw: bytes, query: Mapping[str, str]) -> Message:
        value = parse_json(raw)
        if self.route.read is not None:
            return self.route.read(value, query)
        for name in query:
            raise InvalidRequest(
                f"{self.route.path} takes nothing in the query of its address, and there is "
                f"{name[:64]!r}; write it into the body.",
                field=name[:64],
                reason="UNKNOWN_FIELD",
            )
        return read_message(self._type, value)

    def _dumped(self, response: Message) -> bytes:
        return dump_json((self.route.write or write_message)(response))

    @property
    def _type(self) -> type[Message]:
        parse: Any = self.handler.request_deserializer
        return parse.__self__


class _ResponseLines:
    """What a handler of a stream writes to: a line of JSON for each message."""

    def __init__(self, call: HttpCall) -> None:
        self._call = call
        self._response = web.StreamResponse(headers=call.headers)
        self._response.content_type = "application/x-ndjson"
        self._one_at_a_time = asyncio.Lock()
        self._is_stuck = False  # in a line, perhaps for good
        self.is_begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.context, name)

    async def write(self, message: Message) -> None:
        """Send a line; waits for a reader that is slow."""
        await self._send(dump_json(write_message(message)))

    async def finished(self, error: ServiceError | None = None) -> web.StreamResponse:
        """The response, sent to its end, or cut off where nobody takes that.

        The last line tells what went wrong: the status has been sent.
        """
        try:
            if self._is_stuck:
                raise TimeoutError
            async with asyncio.timeout(SLOW_READER_S):
                if error is not None:
                    await self._send(dump_json(error_json(error)))
                await self._begin()
                await self._response.write_eof()
        except (TimeoutError, ConnectionError, Cancelled):
            self._call.request.protocol.force_close()
        return self._response

    async def _send(self, line: bytes) -> None:
        async with self._one_at_a_time:
            self._is_stuck = True
            try:
                await self._begin()
                await self._response.write(line + b"\n")
                self._is_stuck = False
            except ConnectionError:
                raise Cancelled("the reader of the lines has left.", reason=READER_LEFT) from None

    async def _begin(self) -> None:
        if not self.is_begun:
            self.is_begun = True
            await self._response.prepare(self._call.request)


def expects_to_be_asked(request: web.BaseRequest) -> bool:
    """Whether the caller waits with the body until it is told to go on."""
    expected = request.headers.get("Expect", "").lower()
    return expected == "100-continue" and request.version >= HttpVersion11


def peer_of(request: web.BaseRequest) -> str:
    """Who is at the other end, as audit lines have it."""
    name = request.get_extra_info("peername")
    if not name:
        return "http:"
    host, port = name[:2]
    return f"http:[{host}]:{port}" if ":" in host else f"http:{host}:{port}"


async def read_body(request: web.BaseRequest, max_bytes: int) -> bytes:
    """The whole body. Raises InvalidRequest before more than ``max_bytes`` are held."""
    if (request.content_length or 0) > max_bytes:
        raise _too_large("the body", max_bytes)
    body = bytearray()
    async for chunk in _chunks(request):
        body += chunk
        if len(body) > max_bytes:
            raise _too_large("the body", max_bytes)
    return bytes(body)


async def read_lines(request: web.BaseRequest, max_bytes: int) -> AsyncIterator[bytes]:
    """Lines of the body as they come. Raises InvalidRequest for one that is too long."""
    rest = bytearray()
    async for chunk in _chunks(request):
        *lines, last = chunk.split(b"\n")
        for line in lines:
            yield bytes(rest) + line
            rest.clear()
        rest += last
        if len(rest) > max_bytes:
            raise _too_large("a line", max_bytes)
    if rest:
        yield bytes(rest)


async def _chunks(request: web.BaseRequest) -> AsyncIterator[bytes]:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise InvalidRequest(
            "the body is compressed, which this server does not take; send it as it is.",
            reason=UNSUPPORTED_MEDIA_TYPE,
            field="Content-Encoding",
        )
    try:
        if expects_to_be_asked(request):
            writer: Any = request.writer
            await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            writer.output_size = 0  # the response has not begun
        async for chunk in request.content.iter_any():
            yield chunk
    except RequestPayloadError:
        raise InvalidRequest(
            "the body ends too early, or its chunks have no lengths.", reason="BAD_BODY"
        ) from None
    except ConnectionError:
        raise Cancelled("the caller has left.", reason="CALLER_LEFT") from None


def _too_large(what: str, max_bytes: int) -> InvalidRequest:
    return InvalidRequest(
        f"{what} has more than {max_bytes} bytes; send fewer items in one request.",
        reason=MESSAGE_TOO_LARGE,
    )


def _check_type(request: web.BaseRequest, *, is_stream: bool) -> None:
    """Raise InvalidRequest unless the body says that it is JSON.

    A page of another site may post a form or plain text to an address that only its reader's
    machine reaches; for JSON a browser asks first.
    """
    # As it is written: without one, content_type would tell a default.
    given = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if _JSON.fullmatch(given) or (is_stream and given in _LINES):
        return
    wanted = "application/x-ndjson" if is_stream else "application/json"
    raise InvalidRequest(
        f"the body's Content-Type is {given[:64] or 'missing'!r}; it must be {wanted}.",
        reason=UNSUPPORTED_MEDIA_TYPE,
        field="Content-Type",
    )


def _query(request: web.BaseRequest) -> dict[str, str]:
    query = request.query
    for name in query:
        if len(query.getall(name)) > 1:
            raise InvalidRequest(f"the query of the address has {name[:64]!r} twice.", field=name)
    return dict(query)


def _timeout_s(headers: Mapping[str, str]) -> float | None:
    """The shortest limit that the caller states. Raises InvalidRequest."""
    found = []
    for name in TIMEOUT_HEADERS:
        value = headers.get(name)
        if value is None:
            continue
        if name == "Grpc-Timeout":
            match = _GRPC_TIMEOUT.fullmatch(value)
            seconds = int(match[1]) * _UNITS_S[match[2]] if match else None
        else:
            seconds = float(value) if _SECONDS.fullmatch(value) else None
        if seconds is None:
            example = "'2500m', up to eight digits and one of H M S m u n"
            wanted = example if name == "Grpc-Timeout" else "seconds such as '2.5'"
            raise InvalidRequest(
                f"the header {name} is {value[:64]!r}; it must be {wanted}.", field=name
            )
        found.append(seconds)
    return min(found, default=None)
