"""Server-sent events: responses of a stream as they come, with signs of life in between.

https://html.spec.whatwg.org/multipage/server-sent-events.html. Nothing is kept for a reader beyond
what its connection buffers: the next response is asked for when there is room for it, and a reader
that takes nothing is cut off, so that it holds up neither memory nor the server's end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from aiohttp import web

from kleash.rpc.errors import Cancelled, DeadlineExceeded, ServiceError
from kleash.rpc.http_answer import error_json
from kleash.rpc.http_api import Event
from kleash.rpc.http_json import dump_json

HEARTBEAT_S = 15.0
"""Between two signs of life; proxies close a connection that is silent for a minute."""
SLOW_READER_S = 30.0
"""For a reader to make room for one event."""
RETRY_MS = 1000
"""After which a reader comes back, when the connection ends before the stream does."""
READER_LEFT = "READER_LEFT"
END = "end"
"""Name of the event after the last one: there is nothing to come back for."""


class EventStream:
    """One response."""

    def __init__(self, request: web.BaseRequest, headers: Mapping[str, str]) -> None:
        self._request = request
        # nginx keeps a response until it is whole, unless it is told not to.
        headers = {**headers, "X-Accel-Buffering": "no"}
        self._response = web.StreamResponse(headers=headers)
        self._response.content_type = "text/event-stream"
        self._is_cut = False
        self.is_begun = False

    async def send_all(
        self, responses: AsyncGenerator[Any, None], event_of: Callable[[Any], Event]
    ) -> None:
        """Send ``responses`` to their end, and say that it is the end.

        Raises Cancelled for a reader that has left or takes nothing for SLOW_READER_S.
        """
        coming: asyncio.Future[Any] | None = None
        try:
            if self._request.method == "HEAD":
                return
            await self._write(f"retry: {RETRY_MS}\n\n".encode())
            while True:
                coming = coming or asyncio.ensure_future(anext(responses, None))
                done, _ = await asyncio.wait({coming}, timeout=HEARTBEAT_S)
                if not done:
                    await self._write(b":\n\n")
                    continue
                response, coming = coming.result(), None
                if response is None:
                    break
                await self._write(_encoded(event_of(response)))
            await self._write(_encoded(Event(END, {})))
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.wait({coming})
            await responses.aclose()

    async def end_with(self, error: ServiceError) -> None:
        """Tell what ended the stream, unless the reader is to come back for the rest or is gone."""
        if not self._is_cut and not isinstance(error, DeadlineExceeded):
            with contextlib.suppress(Cancelled):
                await self._write(_encoded(Event("problem", error_json(error))))

    async def finished(self) -> web.StreamResponse:
        """The response, sent to its end."""
        if not self._is_cut:
            await self._begin()
            with contextlib.suppress(ConnectionError):
                await self._response.write_eof()
        return self._response

    async def _write(self, block: bytes) -> None:
        try:
            async with asyncio.timeout(SLOW_READER_S):
                await self._begin()
                await self._response.write(block)
        except TimeoutError:
            self._is_cut = True
            if self._request.transport is not None:
                self._request.transport.abort()
            raise Cancelled(
                f"the reader of the events took nothing for {SLOW_READER_S:g} s.",
                reason="SLOW_READER",
            ) from None
        except ConnectionError:
            self._is_cut = True
            raise Cancelled("the reader of the events has left.", reason=READER_LEFT) from None

    async def _begin(self) -> None:
        if not self.is_begun:
            self.is_begun = True
            await self._response.prepare(self._request)


def _encoded(event: Event) -> bytes:
    """JSON has no line breaks: the data is one line."""
    lines = [b"event: " + event.name.encode(), b"data: " + dump_json(event.data)]
    if event.event_id:
        lines.append(b"id: " + event.event_id.encode())
    return b"\n".join(lines) + b"\n\n"
