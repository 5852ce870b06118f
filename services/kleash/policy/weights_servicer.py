"""WeightsService over gRPC: decodes, calls the replica, encodes."""

# Methods are named as the RPCs are, and take a context whether they need it or not.
# ruff: noqa: N802, ARG002

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from kleash.base import tracing
from kleash.client.weights import WeightsStoreClient
from kleash.lm.frozen import FrozenModel
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sequences import TokenSequence, pack
from kleash.policy.commits import Committed, InFlight
from kleash.policy.decode_loop import DecodeLoop
from kleash.policy.precedence import superseded
from kleash.policy.replica import PREPARING, WeightsReplica
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.requests import unknown_id
from kleash.weights.v1 import weights_pb2, weights_pb2_grpc

X = TypeVar("X")

MODES: dict[int, InFlight] = {
    weights_pb2.IN_FLIGHT_UNSPECIFIED: "keep",
    weights_pb2.IN_FLIGHT_KEEP: "keep",
    weights_pb2.IN_FLIGHT_DRAIN: "drain",
    weights_pb2.IN_FLIGHT_REPREFILL: "reprefill",
    weights_pb2.IN_FLIGHT_ABORT_PARTIAL: "abort_partial",
}

DEADLINE_MARGIN = 0.9
"""Share of a commit's deadline in which running responses may end, so that the caller hears."""

PREPARE_THREADS = 4


class WeightsServicer(weights_pb2_grpc.WeightsServiceServicer):
    """Answers kleash.weights.v1.WeightsService."""

    def __init__(self, replica: WeightsReplica, loop: DecodeLoop, frozen: FrozenModel) -> None:
        self._replica = replica
        self._loop = loop
        self._frozen = frozen
        self._threads = ThreadPoolExecutor(PREPARE_THREADS, "kleash-prepare")
        self._sources: set[WeightsStoreClient] = set()

    def stop(self) -> None:
        """Break off what is being fetched: the process ends when its threads do."""
        for source in list(self._sources):
            source.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def Prepare(
        self, request: weights_pb2.PrepareRequest, context: Any
    ) -> AsyncIterator[weights_pb2.PrepareResponse]:
        """Fetch and check a version, telling how far it is."""
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()

        def on_progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(news.put_nowait, (done, total))

        def work() -> weights_pb2.PrepareResponse:
            sources = [WeightsStoreClient(address) for address in request.sources]
            self._sources.update(sources)
            try:
                return self._replica.prepare(request, sources, on_progress)
            finally:
                self._sources.difference_update(sources)
                for source in sources:
                    source.close()
                loop.call_soon_threadsafe(news.put_nowait, None)

        prepared = loop.run_in_executor(self._threads, tracing.bound(work))
        prepared.add_done_callback(_seen)
        while (progress := await news.get()) is not None:
            yield weights_pb2.PrepareResponse(
                state=PREPARING, fetched_bytes=progress[0], total_bytes=progress[1]
            )
        yield await prepared

    async def Commit(
        self, request: weights_pb2.CommitRequest, context: Any
    ) -> weights_pb2.CommitResponse:
        """Put a staged version in place."""
        if request.in_flight not in MODES:
            raise InvalidRequest(
                f"in_flight is {request.in_flight}; it is one of 1 (DRAIN), 2 (KEEP), "
                "3 (REPREFILL), 4 (ABORT_PARTIAL).",
                field="in_flight",
            )
        left = context.time_remaining()
        commit = self._replica.begin_commit(
            request.key, MODES[request.in_flight], left * DEADLINE_MARGIN if left else None
        )
        done = await _outcome(commit, request.key) if commit is not None else None
        return self._replica.commit_response(request.key, done)

    async def Abort(
        self, request: weights_pb2.AbortRequest, context: Any
    ) -> weights_pb2.AbortResponse:
        """Forget a staged version."""
        return self._replica.abort(request.key)

    async def Rollback(
        self, request: weights_pb2.RollbackRequest, context: Any
    ) -> weights_pb2.RollbackResponse:
        """Go back by one version."""
        await _outcome(self._replica.begin_rollback(request.key), request.key)
        return rolled_back(self._replica)

    async def GetWeights(
        self, request: weights_pb2.GetWeightsRequest, context: Any
    ) -> weights_pb2.GetWeightsResponse:
        """Describe the weights."""
        if request.audit:
            await asyncio.to_thread(self._replica.audit)
        return self._replica.get_weights()

    async def CheckCanary(
        self, request: weights_pb2.CheckCanaryRequest, context: Any
    ) -> weights_pb2.CheckCanaryResponse:
        """Compute log-probabilities of the canary."""
        return await asyncio.to_thread(
            check_canary, self._loop, self._frozen, self._replica, request.token_ids
        )


async def _outcome(commit: Future[Committed[X]], key: weights_pb2.VersionKey) -> Committed[X]:
    """As wait_for_commit. A caller that goes away does not cancel what others wait for."""
    try:
        return await asyncio.shield(asyncio.wrap_future(commit))
    except asyncio.CancelledError:
        if commit.cancelled():
            raise superseded(key) from None
        raise


def _seen(prepared: asyncio.Future[Any]) -> None:
    """A caller that went away does not hear of an error; others ask for the state."""
    if not prepared.cancelled():
        prepared.exception()


def rolled_back(replica: WeightsReplica) -> weights_pb2.RollbackResponse:
    """What a caller is told after a rollback."""
    served = replica.get_weights()
    return weights_pb2.RollbackResponse(version=served.version, digest=served.digest)


def check_canary(
    loop: DecodeLoop, frozen: FrozenModel, replica: WeightsReplica, token_ids: bytes
) -> weights_pb2.CheckCanaryResponse:
    """Log-probabilities of a sequence, computed in the decoding thread with the served weights.

    Raises InvalidRequest for ids that are too few, too many or unknown.
    """
    if len(token_ids) % 4 or not 2 <= len(token_ids) // 4 <= frozen.max_item_tokens:
        raise InvalidRequest(
            f"token_ids has {len(token_ids)} bytes; a canary is 2 to {frozen.max_item_tokens} "
            "ids of 4 bytes.",
            field="token_ids",
        )
    ids = np.frombuffer(token_ids, "<i4").astype(np.int32)
    if sentence := unknown_id(ids, frozen.vocab_size):
        raise InvalidRequest(f"token_ids: {sentence}", field="token_ids")

    def compute() -> weights_pb2.CheckCanaryResponse:
        import torch

        with torch.inference_mode():
            batch = pack([TokenSequence(ids, 1)], frozen.device)
            log_probs = response_log_probs(frozen.model, batch)[0].float().cpu().numpy()
        return weights_pb2.CheckCanaryResponse(
            version=replica.get_weights().version, log_probs=log_probs.astype("<f4").tobytes()
        )

    return loop.run(compute).result()
