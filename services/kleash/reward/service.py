"""The reward service as the chassis hosts it."""

from __future__ import annotations

import grpc

from kleash.reward.admin import RewardAdminServicer
from kleash.reward.config import RewardConfig
from kleash.reward.http import API
from kleash.reward.load import load_models
from kleash.reward.replace import ModelReplacer
from kleash.reward.servicer import RewardServicer
from kleash.reward.shelf import SERVICE, ModelShelf
from kleash.reward.v1 import admin_pb2_grpc, reward_pb2_grpc
from kleash.rpc.work import request_threads


class RewardService:
    """Loads the reward models and answers kleash.reward.v1.RewardService."""

    full_names = ("kleash.reward.v1.RewardService", "kleash.reward.v1.RewardAdminService")
    http_api = API

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._threads = request_threads(SERVICE)
        self._shelf: ModelShelf | None = None
        self._replacer: ModelReplacer | None = None
        self._is_started = False

    def load(self) -> None:
        """Load and warm up every model. Blocks. Raises UserError."""
        self._shelf = ModelShelf(
            load_models(self._config),
            self._config.limits,
            default_name=self._config.default_name,
            ensembles={
                name: entry
                for name, entry in self._config.entries().items()
                if entry.kind == "ensemble"
            },
            keep_previous_s=self._config.keep_previous_s,
        )

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicers to ``server``; after load."""
        assert self._shelf is not None, "register() before load()"
        servicer = RewardServicer(self._shelf, self._threads)
        reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
        self._replacer = ModelReplacer(self._shelf, self._config)
        admin = RewardAdminServicer(self._shelf, self._replacer, self._config.admins)
        admin_pb2_grpc.add_RewardAdminServiceServicer_to_server(admin, server)

    async def start(self) -> None:
        """Start the queues; after register."""
        assert self._shelf is not None, "start() before load()"
        assert self._replacer is not None, "start() before register()"
        await self._shelf.start()
        self._replacer.start()
        self._is_started = True

    def is_ready(self, full_name: str) -> bool:  # noqa: ARG002
        """Whether the models are loaded and the queues run."""
        return self._is_started

    def heartbeat_age_s(self) -> float:
        """Age of the slowest model's last sign of life; 0 when all are idle."""
        return self._shelf.heartbeat_age_s() if self._shelf is not None else 0.0

    async def stop(self) -> None:
        """Finish running work and refuse new work."""
        self._is_started = False
        if self._replacer is not None:
            self._replacer.stop()
        if self._shelf is not None:
            await self._shelf.stop()
        self._threads.shutdown(wait=False)
