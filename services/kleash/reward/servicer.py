"""The gRPC surface of the reward service. What a call means is in requests.py."""

# gRPC names the methods and fixes their arguments.
# ruff: noqa: N802, ARG002

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable, Iterable
from concurrent.futures import Executor
from typing import TypeVar

import grpc

from kleash.base import metrics
from kleash.client.calls import item_code
from kleash.reward.requests import RewardRequests
from kleash.reward.scorer import RawScore, ScoreJob
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.batcher import Batcher
from kleash.rpc.errors import Overloaded
from kleash.rpc.work import Work, answer

STREAM_WINDOW = 256
"""Items of one ScoreStream that are in work at a time; past it the stream is not read further."""

A = TypeVar("A")


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """Answers the five calls of kleash.reward.v1.RewardService."""

    def __init__(
        self, requests: RewardRequests, batcher: Batcher[ScoreJob, RawScore], threads: Executor
    ) -> None:
        """Args:
        threads: where requests are tokenized and responses encoded, off the event loop.
        """
        self._requests = requests
        self._batcher = batcher
        self._threads = threads
        self._model_name = requests.served.name

    async def Score(
        self, request: reward_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        """Score a batch."""
        response = await self._answer(lambda: self._requests.score(request))
        self._record(response.results)
        return response

    async def ScoreStream(
        self,
        request_iterator: AsyncIterable[reward_pb2.ScoreStreamRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """Score items as they come; each result is written as soon as it is there."""
        window = asyncio.Semaphore(STREAM_WINDOW)
        writing = asyncio.Lock()  # gRPC takes one write at a time
        options: reward_pb2.ScoreOptions | None = None

        async def serve(item: reward_pb2.ScoreItem, options: reward_pb2.ScoreOptions) -> None:
            try:
                response = await self._answer_patiently(
                    lambda: self._requests.stream_item(item, options)
                )
                self._record([response.result])
                async with writing:
                    await context.write(response)
            finally:
                window.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in request_iterator:
                    options = options or request.options
                    await window.acquire()
                    tasks.create_task(serve(request.item, options))
        except BaseExceptionGroup as faults:
            raise faults.exceptions[0] from None  # the first one ends the stream, as its status

    async def Compare(
        self, request: reward_pb2.CompareRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.CompareResponse:
        """Rank candidate responses to one prompt."""
        response = await self._answer(lambda: self._requests.compare(request))
        self._record(response.results)
        return response

    async def CountTokens(
        self, request: reward_pb2.CountTokensRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.CountTokensResponse:
        """Count tokens, before any truncation."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._requests.count_tokens, request)

    async def GetModel(
        self, request: reward_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> reward_pb2.GetModelResponse:
        """Describe the model."""
        return self._requests.get_model()

    async def _answer(self, begin: Callable[[], Work[ScoreJob, RawScore, A]]) -> A:
        return await answer(
            begin, self._batcher, self._threads, service="reward", model_name=self._model_name
        )

    async def _answer_patiently(self, begin: Callable[[], Work[ScoreJob, RawScore, A]]) -> A:
        """Wait where a unary call would be refused: a stream is paced by its flow control."""
        while True:
            try:
                return await self._answer(begin)
            except Overloaded as error:
                if error.retry_after_s is None:
                    raise
                await asyncio.sleep(error.retry_after_s)

    def _record(self, results: Iterable[reward_pb2.ScoreResult]) -> None:
        scores = metrics.REWARD_SCORE.labels(self._model_name)
        for result in results:
            code = item_code(result.code)
            metrics.ITEMS.labels("reward", code).inc()
            if code == "OK":
                scores.observe(result.score)
