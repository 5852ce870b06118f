"""A reward service without a model, for tests of its clients: the score of a text is its length.

What it was asked is in ``requests``; ``refusals`` are raised first, one a call; a closed ``gate``
holds calls.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from kleash.common.v1 import common_pb2
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.auth import caller
from kleash.rpc.errors import InvalidRequest, NotFound, ServiceError
from kleash.rpc.server import BackgroundServer, ServerConfig

SERVICE = "kleash.reward.v1.RewardService"
NAMES = ("kind", "honest")


class ScriptedReward(reward_pb2_grpc.RewardServiceServicer):
    """Two models by name, whose components are the length and half of it."""

    full_names = (SERVICE,)

    def __init__(self, *, max_items: int = 4, max_message_bytes: int = 8192) -> None:
        self.limits = common_pb2.Limits(
            max_items=max_items,
            max_item_tokens=1000,
            max_message_bytes=max_message_bytes,
            max_queued_tokens=100_000,
            max_batch_tokens=10_000,
        )
        self.revision = "sha256:1"
        self.requests: list[Any] = []
        self.callers: list[str] = []
        self.refusals: list[ServiceError] = []
        self.gate = threading.Event()
        self.gate.set()
        self.num_running = self.max_running = self.num_cancelled = 0

    def load(self) -> None:
        """Nothing to load."""

    def register(self, server: grpc.aio.Server) -> None:
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self, server)

    async def start(self) -> None:
        """Nothing to start."""

    def is_ready(self, full_name: str) -> bool:
        return True

    def heartbeat_age_s(self) -> float:
        return 0.0

    async def stop(self) -> None:
        """Nothing to stop."""

    def asked(self, kind: type) -> list[Any]:
        """The requests of one kind."""
        return [request for request in self.requests if isinstance(request, kind)]

    async def Score(
        self, request: reward_pb2.ScoreRequest, context: Any
    ) -> reward_pb2.ScoreResponse:
        await self._begin(request)
        if len(request.items) > self.limits.max_items:
            raise InvalidRequest("too many items.", reason="TOO_LARGE", field="items")
        results = [_result(item) for item in request.items]
        return reward_pb2.ScoreResponse(results=results, model=self._served(request))

    async def ScoreStream(
        self, request_iterator: AsyncIterator[reward_pb2.ScoreStreamRequest], context: Any
    ) -> AsyncIterator[reward_pb2.ScoreStreamResponse]:
        served = None
        async for request in request_iterator:
            await self._begin(request)
            served = served or self._served(request)
            yield reward_pb2.ScoreStreamResponse(result=_result(request.item), model=served)

    async def Compare(
        self, request: reward_pb2.CompareRequest, context: Any
    ) -> reward_pb2.CompareResponse:
        await self._begin(request)
        results = [_scored(len(each)) for each in request.responses]
        ranking = sorted(range(len(results)), key=lambda index: -results[index].score)
        return reward_pb2.CompareResponse(
            results=results,
            ranking=ranking,
            preference=[0.5] * len(results),
            served_model=self._served(request),
        )

    async def CountTokens(
        self, request: reward_pb2.CountTokensRequest, context: Any
    ) -> reward_pb2.CountTokensResponse:
        await self._begin(request)
        counts = [len(item.text) for item in request.items]
        return reward_pb2.CountTokensResponse(token_counts=counts, model=self._served(request))

    async def GetModel(
        self, request: reward_pb2.GetModelRequest, context: Any
    ) -> reward_pb2.GetModelResponse:
        self.requests.append(request)
        self.callers.append(caller())
        return reward_pb2.GetModelResponse(model=self._served(request), limits=self.limits)

    async def ListModels(
        self, request: reward_pb2.ListModelsRequest, context: Any
    ) -> reward_pb2.ListModelsResponse:
        models = [common_pb2.ServedModel(name=name, revision=self.revision) for name in NAMES]
        return reward_pb2.ListModelsResponse(models=models)

    async def _begin(self, request: Any) -> None:
        self.requests.append(request)
        self.callers.append(caller())
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            if self.refusals:
                raise self.refusals.pop(0)
            await asyncio.sleep(0.005)
            while not self.gate.is_set():  # noqa: ASYNC110, tests open it in their own threads
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1

    def _served(self, request: Any) -> common_pb2.ServedModel:
        name = request.model or NAMES[0]
        if name not in NAMES or (request.revision and request.revision != self.revision):
            raise NotFound(f"'{name}' {request.revision} is not served.", reason="NOT_SERVED")
        return common_pb2.ServedModel(name=name, revision=self.revision)


def _result(item: reward_pb2.ScoreItem) -> reward_pb2.ScoreResult:
    text = item.text or "".join(turn.content for turn in item.conversation.messages)
    if text.startswith("bad"):
        return reward_pb2.ScoreResult(
            item_id=item.item_id,
            code=common_pb2.ITEM_STATUS_CODE_INVALID_INPUT,
            error_message="it is bad.",
        )
    return _scored(len(text), item.item_id)


def _scored(length: int, item_id: str = "") -> reward_pb2.ScoreResult:
    return reward_pb2.ScoreResult(
        item_id=item_id,
        code=common_pb2.ITEM_STATUS_CODE_OK,
        score=length,
        token_count=length,
        components=[
            reward_pb2.ComponentScore(name="long", score=length),
            reward_pb2.ComponentScore(name="half", score=length / 2),
        ],
        uncertainty=0.25,
    )


@contextmanager
def serving(service: ScriptedReward, **options: Any) -> Iterator[BackgroundServer]:
    """The service on a port of loopback."""
    with BackgroundServer([service], ServerConfig(**options)) as server:
        try:
            yield server
        finally:
            service.gate.set()
