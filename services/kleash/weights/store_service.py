"""WeightsStoreService over gRPC: of the publisher, which plans, and of replicas, which pass on."""

# Methods are named as the RPCs are, and take a context whether they need it or not.
# ruff: noqa: N802, ARG002

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from kleash.rpc.errors import NotFound, PreconditionFailed
from kleash.weights.fetch import CHUNK_BYTES, chunk
from kleash.weights.spool import Spool, SpoolObject
from kleash.weights.store import Store
from kleash.weights.v1 import weights_pb2, weights_pb2_grpc

WATCH_POLL_S = 1.0
"""How often a watcher that hears nothing looks whether the server stops."""

PEER_WAIT_S = 10.0
"""Longest silence of a replica that passes on an object which is still arriving."""

PEER_POLL_S = 0.05
PEER_THREADS = 8
"""Objects that a replica passes on at a time."""


class StoreService:
    """Implements kleash.rpc.service.Service over a publisher's store."""

    full_names: tuple[str, ...] = ("kleash.weights.v1.WeightsStoreService",)

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stopping = threading.Event()

    def load(self) -> None:
        """Nothing: the store belongs to the publisher."""

    def register(self, server: grpc.aio.Server) -> None:
        """Add the servicer."""
        servicer = PublisherServicer(self._store, self._stopping)
        weights_pb2_grpc.add_WeightsStoreServiceServicer_to_server(servicer, server)

    async def start(self) -> None:
        """Nothing runs beside the handlers."""

    def is_ready(self, full_name: str) -> bool:
        """Always: before the first commit there is no head, and it says so."""
        return True

    def heartbeat_age_s(self) -> float:
        """0: there is no model thread."""
        return 0.0

    async def stop(self) -> None:
        """Watchers see the end of their stream."""
        self.end_watches()

    def end_watches(self) -> None:
        """Watchers see the end of their stream within a second."""
        self._stopping.set()


class PublisherServicer(weights_pb2_grpc.WeightsStoreServiceServicer):
    """Answers from a store on disk. File reads and plans run in threads."""

    def __init__(self, store: Store, stopping: threading.Event) -> None:
        self._store = store
        self._stopping = stopping

    async def GetHead(
        self, request: weights_pb2.GetHeadRequest, context: Any
    ) -> weights_pb2.GetHeadResponse:
        """Name the newest committed version."""
        return weights_pb2.GetHeadResponse(head=self._store.head)

    async def PlanUpdate(
        self, request: weights_pb2.PlanUpdateRequest, context: Any
    ) -> weights_pb2.PlanUpdateResponse:
        """Find the cheapest way."""
        return await asyncio.to_thread(
            self._store.plan_update,
            request.have_digest,
            request.schema_digest,
            request.want_digest,
        )

    async def Fetch(
        self, request: weights_pb2.FetchRequest, context: Any
    ) -> AsyncIterator[weights_pb2.FetchResponse]:
        """Stream an object."""
        chunks = self._store.fetch(request.object_id, request.offset)
        while (part := await asyncio.to_thread(next, chunks, None)) is not None:
            yield part

    async def WatchHead(
        self, request: weights_pb2.WatchHeadRequest, context: Any
    ) -> AsyncIterator[weights_pb2.WatchHeadResponse]:
        """Send the head now and whenever it changes."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed: nobody watches
                loop.call_soon_threadsafe(news.set)

        self._store.listeners.add(listener)
        try:
            seen = self._store.head
            yield weights_pb2.WatchHeadResponse(head=seen)
            while not self._stopping.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), WATCH_POLL_S)
                news.clear()
                if (head := self._store.head) != seen:
                    seen = head
                    yield weights_pb2.WatchHeadResponse(head=head)
        finally:
            self._store.listeners.discard(listener)

    async def ListVersions(
        self, request: weights_pb2.ListVersionsRequest, context: Any
    ) -> weights_pb2.ListVersionsResponse:
        """Describe the store."""
        versions = await asyncio.to_thread(self._store.versions)
        return weights_pb2.ListVersionsResponse(versions=versions)


class PeerServicer(weights_pb2_grpc.WeightsStoreServiceServicer):
    """Passes on what a replica has fetched, or is fetching."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        # Of its own: a read waits for bytes that are still to come.
        self._threads = ThreadPoolExecutor(PEER_THREADS, "kleash-peers")

    async def Fetch(
        self, request: weights_pb2.FetchRequest, context: Any
    ) -> AsyncIterator[weights_pb2.FetchResponse]:
        """Stream an object, as far as it is here and then as it arrives."""
        loop = asyncio.get_running_loop()
        chunks = passed_on(self._spool, request.object_id, request.offset)
        while (part := await loop.run_in_executor(self._threads, next, chunks, None)) is not None:
            yield part

    async def GetHead(self, request: weights_pb2.GetHeadRequest, context: Any) -> Any:
        """Refuse."""
        raise _not_a_publisher()

    async def PlanUpdate(self, request: weights_pb2.PlanUpdateRequest, context: Any) -> Any:
        """Refuse."""
        raise _not_a_publisher()

    async def WatchHead(self, request: weights_pb2.WatchHeadRequest, context: Any) -> Any:
        """Refuse."""
        raise _not_a_publisher()

    async def ListVersions(self, request: weights_pb2.ListVersionsRequest, context: Any) -> Any:
        """Refuse."""
        raise _not_a_publisher()


def passed_on(spool: Spool, object_id: bytes, offset: int) -> Iterator[weights_pb2.FetchResponse]:
    """Chunks of an object that may still be arriving. Raises NotFound, Unavailable."""
    source = _wait_for(spool, object_id)
    while data := source.read(offset, CHUNK_BYTES, PEER_WAIT_S):
        yield chunk(offset, data)
        offset += len(data)


def _wait_for(spool: Spool, object_id: bytes) -> SpoolObject:
    """The object, once this replica has begun to fetch it too. Raises NotFound."""
    end = time.monotonic() + PEER_WAIT_S
    while True:
        try:
            return spool.get(object_id)
        except NotFound:
            if time.monotonic() > end:
                raise
        time.sleep(PEER_POLL_S)


def _not_a_publisher() -> PreconditionFailed:
    return PreconditionFailed(
        "a policy replica passes objects on and does not plan; ask the publisher, which is the "
        "trainer.",
        reason="NOT_A_PUBLISHER",
    )
