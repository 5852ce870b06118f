"""The policy service as the chassis hosts it: generation and weights on one server."""

from __future__ import annotations

import asyncio

import grpc

from kleash.policy.config import PolicyConfig
from kleash.policy.engine import Engine
from kleash.policy.servicer import PolicyServicer, WeightsServicer
from kleash.policy.v1 import policy_pb2_grpc
from kleash.weights.v1 import weights_pb2_grpc

END_POLL_S = 0.02


class PolicyService:
    """Implements kleash.rpc.service.Service over an engine."""

    full_names: tuple[str, ...] = (
        "kleash.policy.v1.PolicyService",
        "kleash.weights.v1.WeightsService",
    )

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._is_started = False

    @property
    def engine(self) -> Engine:
        """The engine; after load."""
        assert self._engine is not None, "engine before load()"
        return self._engine

    def load(self) -> None:
        """Load the model and warm it up. Blocks. Raises UserError."""
        self._engine = Engine.load(self._config)

    def register(self, server: grpc.aio.Server) -> None:
        """Add both servicers to ``server``; after load."""
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyServicer(self.engine), server)
        weights_pb2_grpc.add_WeightsServiceServicer_to_server(WeightsServicer(self.engine), server)

    async def start(self) -> None:
        """Accept calls; after register."""
        self._is_started = True

    def is_ready(self) -> bool:
        """Whether the model is loaded and the decoding thread takes requests."""
        return self._is_started and self.engine.loop.is_running

    def heartbeat_age_s(self) -> float:
        """Age of the decoding thread's last sign of life; 0 when it is idle."""
        return self._engine.loop.heartbeat_age_s if self._engine is not None else 0.0

    async def stop(self) -> None:
        """Finish running requests and refuse new ones."""
        self._is_started = False
        if self._engine is None:
            return
        self._engine.loop.stop(wait=False)
        # A thread that waits would keep the stopped process alive when the model hangs.
        while self._engine.loop.is_alive:  # noqa: ASYNC110 (a thread sets no asyncio.Event)
            await asyncio.sleep(END_POLL_S)
