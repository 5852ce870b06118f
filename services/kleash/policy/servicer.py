"""The gRPC surface of the policy: PolicyService and WeightsService."""

# Methods are named as the RPCs are, and take a context whether they need it or not.
# ruff: noqa: N802, ARG002

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable

import grpc

from kleash.base import metrics
from kleash.lm.decode import Decoded
from kleash.policy.decode_loop import finished_or_error
from kleash.policy.engine import Engine
from kleash.policy.requests import encode
from kleash.policy.v1 import policy_pb2, policy_pb2_grpc
from kleash.rpc.errors import InvalidRequest, ServiceError
from kleash.rpc.work import count_rejection
from kleash.weights.v1 import weights_pb2, weights_pb2_grpc


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Answers kleash.policy.v1.PolicyService."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Generate(
        self, request: policy_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Stream responses as they finish."""
        try:
            requests = await asyncio.to_thread(self._engine.requests.generate, request)
        except ServiceError as error:
            count_rejection("policy", error)
            raise
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[list[Decoded] | Exception] = asyncio.Queue()

        def deliver(event: list[Decoded] | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed: nobody waits
                loop.call_soon_threadsafe(events.put_nowait, event)

        generation = self._engine.loop.submit(requests, deliver)
        try:
            num_missing = len(requests)
            while num_missing:
                finished = finished_or_error(await events.get())
                num_missing -= len(finished)
                for response in encode(finished):
                    await context.write(response)
        finally:
            # A caller that went away, or whose deadline has passed, gives its slots back.
            self._engine.loop.cancel(generation)

    async def GetPolicy(
        self, request: policy_pb2.GetPolicyRequest, context: grpc.aio.ServicerContext
    ) -> policy_pb2.GetPolicyResponse:
        """Describe the policy."""
        return self._engine.requests.get_policy()


class WeightsServicer(weights_pb2_grpc.WeightsServiceServicer):
    """Answers kleash.weights.v1.WeightsService."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._receiver = engine.weights

    async def Publish(
        self,
        request_iterator: AsyncIterable[weights_pb2.PublishRequest],
        context: grpc.aio.ServicerContext,
    ) -> weights_pb2.PublishResponse:
        """Receive a version and put it in place."""
        try:
            return await self._publish(request_iterator)
        except BaseException:
            metrics.WEIGHTS_UPDATE_FAILURES.inc()
            raise

    async def GetWeights(
        self, request: weights_pb2.GetWeightsRequest, context: grpc.aio.ServicerContext
    ) -> weights_pb2.GetWeightsResponse:
        """Describe the weights."""
        return self._receiver.get_weights()

    async def _publish(
        self, requests: AsyncIterable[weights_pb2.PublishRequest]
    ) -> weights_pb2.PublishResponse:
        frames = aiter(requests)
        first = await anext(frames, None)
        if first is None or first.WhichOneof("frame") != "manifest":
            raise InvalidRequest(
                "a publish starts with its manifest; send it as the first frame.", field="manifest"
            )
        staging = self._receiver.begin(first.manifest)
        if staging is None:
            return self._receiver.already_committed()
        try:
            async for request in frames:
                if request.WhichOneof("frame") != "chunk":
                    raise InvalidRequest(
                        "after the manifest a publish holds chunks only.", field="manifest"
                    )
                self._receiver.add(staging, request.chunk)
            await asyncio.to_thread(self._receiver.verify, staging)
            applied = self._engine.loop.run(lambda: self._receiver.apply(staging))
            return await asyncio.wrap_future(applied)
        finally:
            self._receiver.finish(staging)
