"""What the scoring clients share: calls that fit a server's limits, waits, item errors."""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from kleash.base.errors import RemoteError
from kleash.common.v1 import common_pb2
from kleash.rpc.aio_channel import AioChannel
from kleash.rpc.call_spans import client_call
from kleash.rpc.client_metrics import count_retry
from kleash.rpc.errors import (
    Cancelled,
    Overloaded,
    PreconditionFailed,
    ServiceError,
    from_rpc_error,
)

Call = Callable[[str, Any], Any]
"""Send a request to the method of that name and return its response."""

Q = TypeVar("Q")
A = TypeVar("A")


class ItemError(RemoteError):
    """The service answered, but not for this item; the message names it and the cause."""

    def __init__(self, index: int, code: str, cause: str) -> None:
        super().__init__(f"item {index} has no result ({code}): {cause}")
        self.index, self.code, self.cause = index, code, cause


def item_code(code: common_pb2.ItemStatusCode) -> str:
    """The short name of an item's status: "OK", "INPUT_TOO_LONG", ..."""
    return common_pb2.ItemStatusCode.Name(code).removeprefix("ITEM_STATUS_CODE_")


@dataclass(frozen=True)
class Cost:
    """What one item takes of a call's limits."""

    num_bytes: int
    """On the wire, in the request or in the reply, whichever is more."""
    num_tokens: int
    """At most; the number of bytes of a text, which no tokenizer exceeds."""


def token_cost(num_tokens: int) -> Cost:
    """Of token ids: four bytes each way per token, and room for the digest and the ids."""
    return Cost(num_bytes=4 * num_tokens + 256, num_tokens=num_tokens)


def text_cost(text: str) -> Cost:
    """Of text; its reply may hold four bytes for each of its tokens."""
    num_bytes = len(text.encode())
    return Cost(num_bytes=4 * num_bytes + 256, num_tokens=num_bytes)


def split_calls(costs: Sequence[Cost], limits: common_pb2.Limits) -> Iterator[slice]:
    """Consecutive items per call, as many as the limits allow, and at least one.

    A call takes at most a quarter of the queue, so that several callers find room in it.
    """
    max_tokens = max(limits.max_queued_tokens // 4, 1)
    begin = num_bytes = num_tokens = 0
    for index, cost in enumerate(costs):
        num_bytes, num_tokens = num_bytes + cost.num_bytes, num_tokens + cost.num_tokens
        is_full = (
            index - begin >= limits.max_items
            or num_bytes > limits.max_message_bytes
            or num_tokens > max_tokens
        )
        if is_full and index > begin:
            yield slice(begin, index)
            begin, num_bytes, num_tokens = index, cost.num_bytes, cost.num_tokens
    if len(costs) > begin:
        yield slice(begin, len(costs))


def run_calls(function: Callable[[Q], A], requests: Sequence[Q], *, parallel: int) -> list[A]:
    """``function`` of every request, in order, ``parallel`` at a time. Raises the first error."""
    if parallel == 1 or len(requests) < 2:
        return [function(request) for request in requests]
    with ThreadPoolExecutor(min(parallel, len(requests))) as threads:
        # With the caller's context, which holds its trace.
        answers = [
            threads.submit(contextvars.copy_context().run, function, request)
            for request in requests
        ]
        try:
            return [answer.result() for answer in answers]
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def check_one_revision(served: Sequence[common_pb2.ServedModel]) -> None:
    """Raise PreconditionFailed when replicas with different models answered parts of one list."""
    revisions = sorted({model.revision for model in served})
    if len(revisions) > 1:
        raise PreconditionFailed(
            f"replicas with different models answered ({', '.join(revisions)}); results of "
            "different models do not compare: try again when the roll-out is over.",
            reason="REVISION_CHANGED",
        )


class Patience:
    """How long one call may take, and how much of that it may wait for an overloaded service.

    gRPC itself has tried five times before this is asked, each after the wait that the server
    named.
    """

    def __init__(self, *, timeout_s: float, max_wait_s: float) -> None:
        self._ends = time.monotonic() + timeout_s
        self._wait_left_s = max_wait_s

    @property
    def left_s(self) -> float:
        """Until the deadline, for the next attempt."""
        return max(self._ends - time.monotonic(), 0.001)

    def pause_s(self, error: ServiceError) -> float:
        """How long to wait before the next attempt.

        Raises ``error`` when it is no overload that a time to retry came with, or when that time
        is past the deadline or past what is left of ``max_wait_s``.
        """
        if not isinstance(error, Overloaded) or error.retry_after_s is None:
            raise error
        # Callers that were refused together do not come back together.
        pause = error.retry_after_s * random.uniform(1.0, 1.2)
        if pause > self._wait_left_s or pause >= self.left_s:
            raise error
        self._wait_left_s -= pause
        return pause


def remote_call(
    stub: Any, *, service: str, address: str, timeout_s: float, max_wait_s: float = 0.0
) -> Call:
    """Calls of ``service``: a deadline on each, waits included, errors as kleash.rpc.errors."""

    def call(method: str, request: Any) -> Any:
        patience = Patience(timeout_s=timeout_s, max_wait_s=max_wait_s)
        while True:
            try:
                with client_call(service, method, address) as metadata:
                    return getattr(stub, method)(
                        request, timeout=patience.left_s, metadata=metadata
                    )
            except grpc.RpcError as error:
                fault = from_rpc_error(error, address=address)
            time.sleep(patience.pause_s(fault))
            count_retry(service, method)

    return call


AioCall = Callable[[str, Any], Awaitable[Any]]
"""As Call, for asyncio."""


async def run_aio_calls(
    function: Callable[[Q], Awaitable[A]], requests: Sequence[Q], *, parallel: int
) -> list[A]:
    """As run_calls. The first error, or a cancellation, cancels the calls that are under way."""
    room = asyncio.Semaphore(parallel)

    async def run(request: Q) -> A:
        async with room:
            return await function(request)

    try:
        async with asyncio.TaskGroup() as tasks:
            answers = [tasks.create_task(run(request)) for request in requests]
    except BaseExceptionGroup as faults:
        raise faults.exceptions[0] from None
    return [answer.result() for answer in answers]


def aio_remote_call(
    channel: AioChannel, *, service: str, address: str, timeout_s: float, max_wait_s: float
) -> AioCall:
    """As remote_call, for asyncio. Cancelling the task cancels the call on the server, too."""

    async def call(method: str, request: Any) -> Any:
        patience = Patience(timeout_s=timeout_s, max_wait_s=max_wait_s)
        while True:
            try:
                async with channel.call() as (stub, metadata):
                    with client_call(service, method, address) as trace:
                        return await getattr(stub, method)(
                            request, timeout=patience.left_s, metadata=(*metadata, *trace)
                        )
            except grpc.RpcError as error:
                fault = from_rpc_error(error, address=address)
            except asyncio.CancelledError:
                raise_if_closed()
                raise
            await asyncio.sleep(patience.pause_s(fault))
            count_retry(service, method)

    return call


def raise_if_closed() -> None:
    """Raise Cancelled where it was a call that was cancelled and not the task that awaits it."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        raise Cancelled("the client was closed while the call was under way.") from None
