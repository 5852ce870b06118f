"""From the bytes of a call to what its handler gets: may call, within quota, of a bearable size.

In that order, so that a caller who may not call costs nothing, and one beyond its quota no parsing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor

from kleash.base import metrics
from kleash.rpc import audit, wire
from kleash.rpc.auth import caller
from kleash.rpc.errors import InvalidRequest, Overloaded
from kleash.rpc.quota import Quotas


@dataclass(frozen=True)
class Reception:
    """Of the calls of one method."""

    service: str
    """Label of the metrics of refused calls."""
    method: str
    check: Callable[[Any], None]
    """Raises ServiceError for a caller who may not call."""
    quotas: Quotas
    parse: Callable[[bytes], Any]
    descriptor: Descriptor | None
    """Of the request; None for bytes that are no message of ours."""
    is_streaming: bool
    """Whether requests come as a stream."""
    audits_text: bool

    async def request(self, raw: Any, context: Any) -> Any:
        """What the handler gets: the request, or an iterator of them. Raises ServiceError."""
        self.admit(context)
        return self._requests(raw) if self.is_streaming else await self._parsed(raw)

    def admit(self, context: Any) -> None:
        """Let a call in. Raises ServiceError for one that may not be made, or not now."""
        self.check(context)
        try:
            self.quotas.begin(caller(), context.invocation_metadata() or ())
        except Overloaded:
            metrics.REQUESTS_REJECTED.labels(self.service, "quota").inc()
            raise

    def note_text(self, request: Any) -> None:
        """Write what a request holds, where the operator wants it."""
        if self.audits_text and self.descriptor is not None:
            audit.record_text(caller=caller(), method=self.method, request=request)

    async def _requests(self, stream: AsyncIterable[bytes]) -> AsyncIterator[Any]:
        async for raw in stream:
            yield await self._parsed(raw)

    async def _parsed(self, raw: bytes) -> Any:
        if self.descriptor is not None and wire.is_large(raw):
            try:
                await asyncio.to_thread(wire.check_fields, raw, self.descriptor)
            except InvalidRequest:
                metrics.REQUESTS_REJECTED.labels(self.service, "too_large").inc()
                raise
        request = self.parse(raw)
        self.note_text(request)
        return request


def descriptor_of(parse: Callable[[bytes], Any] | None) -> Descriptor | None:
    """Type of the messages that ``parse`` makes, which generated code gives as Type.FromString."""
    return getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
