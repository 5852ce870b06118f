"""One connection of the HTTP port: its age, and how long it waits for whom.

A connection may be silent for ``keepalive_timeout`` before and between requests, and may take
``send_s`` for an answer. How long a body may take is the call's time limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.web_protocol import RequestHandler

from kleash.base import metrics
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.guard import OTHER, as_service_error
from kleash.rpc.http_answer import answer_error

IS_SPOKEN = web.RequestKey("is_spoken", bool)
"""Of a request: whether it is of a version of HTTP that the port speaks."""

_SPOKEN = (HttpVersion10, HttpVersion11)


class ConnectionServer(web.Server):
    """Makes a Connection for each connection."""

    def __init__(self, handle: Callable[[web.BaseRequest], Any], **options: Any) -> None:
        super().__init__(handle, request_factory=_request, **options)

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)


class Connection(RequestHandler):
    """Knows its age, and answers what is no HTTP request in JSON, too."""

    __slots__ = ("_send_s", "born", "is_idle")

    def __init__(self, manager: web.Server, *, send_s: float, **options: Any) -> None:
        """``send_s``: seconds for a reader to take an answer."""
        super().__init__(manager, **options)
        self._send_s = send_s

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.born = time.monotonic()
        self.is_idle = False  # from the first answer until the next request
        assert isinstance(transport, asyncio.WriteTransport)
        # An answer counts as sent when none of it waits in this process.
        transport.set_write_buffer_limits(0)
        super().connection_made(transport)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer, or cut off a reader that does not take it."""
        try:
            async with asyncio.timeout(self._send_s):
                return await super().finish_response(request, resp, start_time)
        except TimeoutError:
            self.force_close()
            return resp, True
        finally:
            self.is_idle = True

    def force_close(self) -> None:
        """Close, and drop what the reader has not taken: it may never take it."""
        transport = self.transport
        super().force_close()
        if transport is not None and transport.get_write_buffer_size():
            transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,  # noqa: ARG002
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        if status >= 500 and isinstance(exc, Exception):
            error = as_service_error(exc, "HTTP")
        else:
            error = bad_http()
        response = answer_error(error, {"Server": "kleash"})
        response.force_close()
        metrics.HTTP_REQUESTS.labels(OTHER, str(response.status)).inc()
        return response


def bad_http() -> InvalidRequest:
    """The answer to what is no request."""
    return InvalidRequest("this is not a request of HTTP/1.1.", reason="BAD_HTTP")


def _request(
    message: Any, payload: Any, connection: Any, writer: Any, task: Any
) -> web.BaseRequest:
    """As web.Server makes one, but answered in HTTP/1.1 whatever version it claims."""
    is_spoken = message.version in _SPOKEN
    if not is_spoken:
        message = message._replace(version=HttpVersion11, should_close=True)
    request = web.BaseRequest(
        message, payload, connection, writer, task, asyncio.get_running_loop()
    )
    request[IS_SPOKEN] = is_spoken
    return request
