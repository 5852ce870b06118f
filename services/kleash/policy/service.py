"""The policy service as the chassis hosts it: generation, weights and their store on one server."""

from __future__ import annotations

import asyncio

import grpc

from kleash.policy.catch_up import CatchUp
from kleash.policy.config import PolicyConfig
from kleash.policy.engine import Engine
from kleash.policy.servicer import PolicyServicer
from kleash.policy.v1 import policy_pb2_grpc
from kleash.policy.weights_servicer import WeightsServicer
from kleash.weights.store_service import PeerServicer
from kleash.weights.v1 import weights_pb2_grpc

POLICY_SERVICE = "kleash.policy.v1.PolicyService"

END_POLL_S = 0.02


class PolicyService:
    """Implements kleash.rpc.service.Service over an engine."""

    full_names: tuple[str, ...] = (
        POLICY_SERVICE,
        "kleash.weights.v1.WeightsService",
        "kleash.weights.v1.WeightsStoreService",
    )

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._is_started = False
        self._catch_up: CatchUp | None = None
        self._weights: WeightsServicer | None = None

    @property
    def engine(self) -> Engine:
        """The engine; after load."""
        assert self._engine is not None, "engine before load()"
        return self._engine

    def load(self) -> None:
        """Load the model and warm it up. Blocks. Raises UserError."""
        self._engine = Engine.load(self._config)

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers to ``server``; after load."""
        engine = self.engine
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyServicer(engine), server)
        self._weights = WeightsServicer(engine.weights, engine.loop, engine.frozen)
        weights_pb2_grpc.add_WeightsServiceServicer_to_server(self._weights, server)
        weights_pb2_grpc.add_WeightsStoreServiceServicer_to_server(
            PeerServicer(engine.weights.spool), server
        )

    async def start(self) -> None:
        """Accept calls; after register."""
        self._is_started = True
        if self._config.weights.publisher is not None:
            self._catch_up = CatchUp(self.engine.weights, self._config.weights.publisher)
            self._catch_up.start()

    def is_ready(self, full_name: str) -> bool:
        """Whether the decoding thread takes requests, and for generation the weights are right."""
        is_running = self._is_started and self.engine.loop.is_running
        return is_running and (full_name != POLICY_SERVICE or self.engine.weights.is_ready())

    def heartbeat_age_s(self) -> float:
        """Age of the decoding thread's last sign of life; 0 when it is idle."""
        return self._engine.loop.heartbeat_age_s if self._engine is not None else 0.0

    async def stop(self) -> None:
        """Finish running requests and refuse new ones."""
        self._is_started = False
        if self._engine is None:
            return
        if self._catch_up is not None:
            self._catch_up.stop()
        if self._weights is not None:
            self._weights.stop()
        self._engine.loop.stop(wait=False)
        # A thread that waits would keep the stopped process alive when the model hangs.
        while self._engine.loop.is_alive:  # noqa: ASYNC110 (a thread sets no asyncio.Event)
            await asyncio.sleep(END_POLL_S)
        self._engine.weights.spool.close()
