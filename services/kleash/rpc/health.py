"""grpc.health.v1 for the hosted services.

Names: each full service name (readiness of that service), "" (all of them), "liveness" (the process
should go on running; never NOT_SERVING only because it loads, is busy, or drains).
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # pyright: ignore[reportAttributeAccessIssue]

HEALTH_SERVICE = "grpc.health.v1.Health"
LIVENESS = "liveness"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthBoard(health_aio.HealthServicer):
    """The status of every name; Check and Watch are those of grpcio-health-checking.

    Watches of clients stay open as long as the server does, and a server that stops waits for open
    calls: ``end_watches`` lets it stop as soon as the real calls are done.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self._names = ("", *names)
        self._statuses = dict.fromkeys(self._names, NOT_SERVING) | {LIVENESS: SERVING}
        self._watches: set[asyncio.Task[None]] = set()
        self._server_status.update(self._statuses)

    async def show(self, ready: dict[str, bool], *, is_alive: bool) -> None:
        """Set the status of every service name, of their conjunction "" and of "liveness"."""
        wanted = {name: SERVING if is_ready else NOT_SERVING for name, is_ready in ready.items()}
        wanted[""] = SERVING if all(ready.values()) else NOT_SERVING
        wanted[LIVENESS] = SERVING if is_alive else NOT_SERVING
        for name, status in wanted.items():
            if self._statuses[name] != status:
                self._statuses[name] = status
                await self.set(name, status)

    def is_serving(self, name: str) -> bool:
        """Whether the status of a name, as it was shown last, is SERVING."""
        return self._statuses[name] == SERVING

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Send the status now and at every change, until the caller leaves or the server stops."""
        watch = asyncio.ensure_future(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await asyncio.wait([watch])
        finally:
            watch.cancel()
            self._watches.discard(watch)

    async def List(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        """The status of every name; the parent class has no answer to this method."""
        messages: Any = health_pb2  # its published types do not know List yet
        statuses = {
            name: health_pb2.HealthCheckResponse(status=status)
            for name, status in self._statuses.items()
        }
        return messages.HealthListResponse(statuses=statuses)

    def end_watches(self) -> None:
        """Complete every open Watch."""
        for watch in self._watches:
            watch.cancel()

    def register(self, server: grpc.aio.Server) -> None:
        """Add the health service to ``server``; one board may be shown by several servers."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)
