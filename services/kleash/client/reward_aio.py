"""Client of the reward service for asyncio: the methods of RewardClient, to be awaited.

async with AsyncRewardClient("reward:50051") as reward:
    print((await reward.score_texts(["..."]))[0].score)

A client belongs to the event loop of its first call, and gRPC wants one running loop a process:
kleash.rpc.aio_channel.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from typing import Any, TypeVar, Unpack

import grpc

from kleash.client.calls import aio_remote_call, raise_if_closed, run_aio_calls
from kleash.client.reward import METHODS_TO_RETRY, SERVICE
from kleash.client.reward_messages import (
    TOO_LARGE,
    Comparison,
    KnownLimits,
    ListKeywords,
    Messages,
    Plan,
    RewardPlans,
    Score,
    ScoreKeywords,
    input_item,
    options,
    read_score,
    token_item,
)
from kleash.client.reward_settings import ClientOptions, OptionKeywords, settings_from_env
from kleash.client.types import Tokens
from kleash.common.v1 import common_pb2
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.aio_channel import AioChannel
from kleash.rpc.call_spans import client_call
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import InvalidRequest, from_rpc_error

R = TypeVar("R")

Inputs = Iterable[str | Messages] | AsyncIterable[str | Messages]


class AsyncRewardClient:
    """A connection to a reward service. For the tasks of one event loop.

    Cancelling a task cancels its calls, on the server too.
    """

    def __init__(
        self,
        address: str,
        *,
        model: str = "",
        revision: str = "",
        timeout_s: float = 120.0,
        max_wait_s: float = 60.0,
        parallel_calls: int = 4,
        credentials: Credentials | None = None,
    ) -> None:
        """Arguments as those of RewardClient. Connects at the first call."""
        self._channel = AioChannel(
            address,
            service=SERVICE,
            methods_to_retry=METHODS_TO_RETRY,
            make_stub=reward_pb2_grpc.RewardServiceStub,
            credentials=credentials,
        )
        self._address = address
        self._limits = KnownLimits()
        self._use(ClientOptions(model, revision, timeout_s, max_wait_s, parallel_calls))

    def _use(self, chosen: ClientOptions) -> None:
        self._options = chosen
        self._plans = RewardPlans(chosen.model, chosen.revision)
        self._call = aio_remote_call(
            self._channel,
            service=SERVICE,
            address=self._address,
            timeout_s=chosen.timeout_s,
            max_wait_s=chosen.max_wait_s,
        )

    @classmethod
    def from_env(cls, **keywords: Any) -> AsyncRewardClient:
        """As RewardClient.from_env."""
        settings = settings_from_env(needs_address="address" not in keywords)
        return cls(**{**settings, **keywords})

    def with_options(self, **changes: Unpack[OptionKeywords]) -> AsyncRewardClient:
        """As RewardClient.with_options."""
        other = copy.copy(self)
        other._use(dataclasses.replace(self._options, **changes))
        return other

    def pinned(self, revision: str) -> AsyncRewardClient:
        """As RewardClient.pinned."""
        return self.with_options(revision=revision)

    async def get_model(self) -> reward_pb2.GetModelResponse:
        """As RewardClient.get_model."""
        return await self._call("GetModel", self._plans.get_model())

    async def list_models(self) -> list[common_pb2.ServedModel]:
        """As RewardClient.list_models."""
        return list((await self._call("ListModels", reward_pb2.ListModelsRequest())).models)

    async def score_tokens(
        self,
        sequences: Sequence[Tokens],
        *,
        tokenizer_sha256: str,
        **keywords: Unpack[ListKeywords],
    ) -> list[Score]:
        """As RewardClient.score_tokens."""
        items = [token_item(sequence, tokenizer_sha256) for sequence in sequences]
        return await self._run(self._plans.score(items, **keywords)) if items else []

    async def score_texts(
        self, texts: Sequence[str], **keywords: Unpack[ListKeywords]
    ) -> list[Score]:
        """As RewardClient.score_texts."""
        return await self.score(texts, **keywords)

    async def score_conversations(
        self, conversations: Sequence[Messages], **keywords: Unpack[ListKeywords]
    ) -> list[Score]:
        """As RewardClient.score_conversations."""
        return await self.score(conversations, **keywords)

    async def score(
        self, inputs: Sequence[str | Messages], **keywords: Unpack[ListKeywords]
    ) -> list[Score]:
        """As RewardClient.score."""
        items = [input_item(each) for each in inputs]
        return await self._run(self._plans.score(items, **keywords)) if items else []

    async def compare(
        self, prompt: str | Messages, responses: Sequence[str], **keywords: Unpack[ScoreKeywords]
    ) -> Comparison:
        """As RewardClient.compare."""
        return await self._run(self._plans.compare(prompt, responses, **keywords))

    async def count_tokens(self, inputs: Sequence[str | Messages]) -> list[int]:
        """As RewardClient.count_tokens."""
        items = [input_item(each) for each in inputs]
        return await self._run(self._plans.count_tokens(items)) if items else []

    async def score_stream(
        self, inputs: Inputs, *, timeout_s: float | None = None, **keywords: Unpack[ScoreKeywords]
    ) -> AsyncGenerator[Score, None]:
        """As RewardClient.score_stream; ``inputs`` may be an asynchronous iterator.

        Close it (contextlib.aclosing) where it is not read to its end.
        """
        scoring, limits = options(**keywords), await self._known_limits()
        failures: list[Exception] = []

        async def requests() -> AsyncIterator[reward_pb2.ScoreStreamRequest]:
            index = 0
            try:
                async for each in _each(inputs):
                    yield self._plans.stream_request(index, input_item(each), scoring, limits)
                    index += 1
            except Exception as error:  # a task of gRPC runs this; its caller would not be told
                failures.append(error)

        async with self._channel.call() as (stub, metadata):
            with client_call(SERVICE, "ScoreStream", self._address) as trace:
                responses = stub.ScoreStream(
                    requests(), timeout=timeout_s, metadata=(*metadata, *trace)
                )
                try:
                    async for response in responses:
                        index = int(response.result.item_id)
                        yield read_score(index, response.result, response.model)
                    if failures:
                        raise failures[0]
                except grpc.RpcError as error:
                    raise from_rpc_error(error, address=self._address) from None
                except asyncio.CancelledError:
                    raise_if_closed()
                    raise
                finally:
                    responses.cancel()  # a caller who stops early has ended the stream, too

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, plan: Plan[R]) -> R:
        limits = await self._known_limits()
        try:
            return await self._attempt(plan, limits)
        except InvalidRequest as error:
            # A server with smaller limits has taken the place of the one that told them.
            self._limits.value = None
            if error.reason != TOO_LARGE or (fresh := await self._known_limits()) == limits:
                raise
        return await self._attempt(plan, fresh)

    async def _attempt(self, plan: Plan[R], limits: common_pb2.Limits) -> R:
        replies = await run_aio_calls(
            lambda request: self._call(plan.method, request),
            plan.requests(limits),
            parallel=self._options.parallel_calls,
        )
        return plan.result(replies, limits)

    async def _known_limits(self) -> common_pb2.Limits:
        if (known := self._limits.value) is None:
            known = self._limits.value = (await self.get_model()).limits
        return known


async def _each(inputs: Inputs) -> AsyncIterator[str | Messages]:
    if isinstance(inputs, AsyncIterable):
        async for each in inputs:
            yield each
    else:
        for each in inputs:
            yield each
