"""The gRPC surface of the reward service. What a call means is in requests.py."""

# gRPC names the methods and fixes their arguments.
# ruff: noqa: N802, ARG002

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Iterable
from concurrent.futures import Executor
from typing import Any, TypeVar

import grpc

from kleash.base import metrics
from kleash.client.calls import item_code
from kleash.reward.model import RawScore, ScoreJob
from kleash.reward.shelf import SERVICE, ModelShelf, ShelvedModel
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc import audit
from kleash.rpc.errors import Overloaded
from kleash.rpc.work import Work, answer

STREAM_WINDOW = 256
"""Items of one ScoreStream that are in work at a time; past it the stream is not read further."""

A = TypeVar("A")


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Answers the calls of kleash.reward.v1.RewardService."""

    def __init__(self, shelf: ModelShelf, threads: Executor) -> None:
        """Args:
        threads: where requests are tokenized and responses encoded, off the event loop.
        """
        self._shelf = shelf
        self._threads = threads

    async def Score(
        self, request: reward_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        """Score a batch."""
        model = self._find(request, num_items=len(request.items))
        response = await self._answer(
            model, lambda: model.requests.score(request), request.ByteSize()
        )
        _record(model, response.results)
        return response

    async def ScoreStream(
        self,
        request_iterator: AsyncIterable[reward_pb2.ScoreStreamRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Score items as they come; each result is written as soon as it is there."""
        window = asyncio.Semaphore(STREAM_WINDOW)
        writing = asyncio.Lock()  # gRPC takes one write at a time
        model: ShelvedModel | None = None
        options = reward_pb2.ScoreOptions()

        async def serve(model: ShelvedModel, item: reward_pb2.ScoreItem) -> None:
            try:
                response = await self._answer_patiently(
                    model, lambda: model.requests.stream_item(item, options), item.ByteSize()
                )
                _record(model, [response.result])
                async with writing:
                    await context.write(response)
            finally:
                window.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in request_iterator:
                    if model is None:
                        options = request.options
                        model = self._find(request)
                    audit.note(num_items=1)
                    await window.acquire()
                    tasks.create_task(serve(model, request.item))
        except BaseExceptionGroup as faults:
            raise faults.exceptions[0] from None  # the first one ends the stream, as its status

    async def Compare(
        self, request: reward_pb2.CompareRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.CompareResponse:
        """Rank candidate responses to one prompt."""
        model = self._find(request, num_items=len(request.responses))
        response = await self._answer(
            model, lambda: model.requests.compare(request), request.ByteSize()
        )
        _record(model, response.results)
        return response

    async def CountTokens(
        self, request: reward_pb2.CountTokensRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.CountTokensResponse:
        """Count tokens, before any truncation."""
        requests = self._find(request, num_items=len(request.items)).requests
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, requests.count_tokens, request)

    async def GetModel(
        self, request: reward_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.GetModelResponse:
        """Describe a model."""
        return self._find(request).requests.get_model()

    async def ListModels(
        self, request: reward_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ListModelsResponse:
        """Name the served models."""
        return reward_pb2.ListModelsResponse(models=self._shelf.served)

    def _find(self, request: Any, *, num_items: int | None = None) -> ShelvedModel:
        """The model that a request names. Raises NotFound."""
        audit.note(model=request.model or self._shelf.default_name, num_items=num_items)
        model = self._shelf.find(request.model, request.revision)
        audit.note(revision=model.model.facts.revision)
        return model

    async def _answer(
        self,
        model: ShelvedModel,
        begin: Callable[[], Work[ScoreJob, RawScore, A]],
        num_bytes: int,
    ) -> A:
        return await answer(
            begin,
            model.batcher,
            self._threads,
            service=SERVICE,
            model_name=model.model.facts.name,
            num_bytes=num_bytes,
        )

    async def _answer_patiently(
        self,
        model: ShelvedModel,
        begin: Callable[[], Work[ScoreJob, RawScore, A]],
        num_bytes: int,
    ) -> A:
        """Wait where a unary call would be refused: a stream is paced by its flow control."""
        while True:
            try:
                return await self._answer(model, begin, num_bytes)
            except Overloaded as error:
                if error.retry_after_s is None:
                    raise
                await asyncio.sleep(error.retry_after_s)


def _record(model: ShelvedModel, results: Iterable[reward_pb2.ScoreResult]) -> None:
    scores = metrics.REWARD_SCORE.labels(model.model.facts.name)
    for result in results:
        code = item_code(result.code)
        metrics.ITEMS.labels(SERVICE, code).inc()
        if code == "OK":
            scores.observe(result.score)
