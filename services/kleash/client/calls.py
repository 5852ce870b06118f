"""What the scoring clients share: calls that fit a server's limits, and errors of single items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from kleash.base.errors import RemoteError
from kleash.common.v1 import common_pb2
from kleash.rpc.errors import PreconditionFailed, from_rpc_error

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
        answers = [threads.submit(function, request) for request in requests]
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


def remote_call(stub: Any, *, address: str, timeout_s: float) -> Call:
    """Calls over gRPC: a deadline on each, errors as kleash.rpc.errors."""

    def call(method: str, request: Any) -> Any:
        try:
            return getattr(stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=address) from None

    return call
