"""What the chassis asks of a service. The order of calls is load, register, start, ..., stop."""

from __future__ import annotations

from typing import Protocol

import grpc


class Service(Protocol):
    """A hosted service. One object may answer for several gRPC services that share a model.

    One that is to be served over HTTP, too, has ``http_api``: kleash.rpc.http_api.HasHttpApi.
    """

    @property
    def full_names(self) -> tuple[str, ...]:
        """Names of the gRPC services, such as ("kleash.reward.v1.RewardService",)."""
        ...

    def load(self) -> None:
        """Load the model and warm it up. Blocks; runs in a thread; raises UserError."""
        ...

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers to ``server``; after load. Until then calls answer UNAVAILABLE."""
        ...

    async def start(self) -> None:
        """Start queues and batchers on the event loop."""
        ...

    def is_ready(self, full_name: str) -> bool:
        """Whether calls of one of ``full_names`` can be served now: its health status."""
        ...

    def heartbeat_age_s(self) -> float:
        """Seconds since the model thread last showed a sign of life; 0 when it is idle."""
        ...

    async def stop(self) -> None:
        """Finish running work and refuse new work with Unavailable."""
        ...
