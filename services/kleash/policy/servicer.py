"""The gRPC surface of generation: PolicyService."""

# Methods are named as the RPCs are, and take a context whether they need it or not.
# ruff: noqa: N802, ARG002

from __future__ import annotations

import asyncio
import contextlib
import time

import grpc

from kleash.base import tracing
from kleash.lm.decode import Decoded
from kleash.policy.decode_loop import finished_or_error
from kleash.policy.engine import Engine
from kleash.policy.generation import Generation
from kleash.policy.requests import encode
from kleash.policy.v1 import policy_pb2, policy_pb2_grpc
from kleash.rpc import audit
from kleash.rpc.errors import ServiceError
from kleash.rpc.work import count_rejection


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Answers kleash.policy.v1.PolicyService."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Generate(
        self, request: policy_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Stream responses as they finish."""
        audit.note(model=self._engine.requests.name, num_items=len(request.prompts))
        try:
            with tracing.span("check"):
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
                audit.note(num_tokens=sum(len(each.ids) for each in finished))
                for response in encode(finished):
                    await context.write(response)
        finally:
            # A caller that went away, or whose deadline has passed, gives its slots back.
            self._engine.loop.cancel(generation)
            _record(generation)

    async def GetPolicy(
        self, request: policy_pb2.GetPolicyRequest, context: grpc.aio.ServicerContext
    ) -> policy_pb2.GetPolicyResponse:
        """Describe the policy."""
        response = self._engine.requests.get_policy()
        audit.note(model=response.model.name, revision=response.model.revision)
        return response


def _record(generation: Generation) -> None:
    """The wait for a slot, and the time from the first one to the last response."""
    parent, ended = tracing.current(), time.monotonic()
    started = ended if generation.started is None else generation.started
    submitted = tracing.at_ns(generation.submitted)
    tracing.record_span("queue", submitted, tracing.at_ns(started), parent=parent)
    if generation.started is not None:
        tracing.record_span(
            "decode",
            tracing.at_ns(started),
            tracing.at_ns(ended),
            parent=parent,
            responses=len(generation.requests) - len(generation.open),
        )
