"""One queue and one model thread for all callers of a service.

    submit() ─► admission by tokens ─► waiting calls ─► next batch ─► model thread ─► results
                full: Overloaded       gone or expired: sorted by     compute()       one future
                                       dropped here     length                        a call

Everything but ``compute`` runs on the event loop. A batch is the largest one at hand: nothing waits
for company. It always holds an item of the oldest call, so that no call starves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from kleash.base import metrics
from kleash.rpc.batching import choose_batch
from kleash.rpc.deadline import deadline
from kleash.rpc.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from kleash.rpc.model_thread import ModelThread

T = TypeVar("T")
R = TypeVar("R")
X = TypeVar("X")

# Items looked at for one batch; bounds the sorting when the queue is long.
WINDOW_ITEMS = 1024
# Bounds of the retry hint.
MIN_RETRY_S, MAX_RETRY_S = 0.1, 10.0


@dataclass(frozen=True)
class BatchTiming(Generic[R]):
    """Results of one submit, in its order, and where its time went."""

    results: list[R]
    queue_ns: int
    """Waiting, for the model and for batches without this call."""
    compute_ns: int
    """Wall time of the batches that held its items."""


@dataclass(eq=False)
class _Call:
    """One submit."""

    items: Sequence[Any]
    sizes: list[int]
    isolate: bool
    future: asyncio.Future[list[Any]]
    deadline: float | None
    enqueued: float = field(default_factory=time.monotonic)
    waiting: list[int] = field(default_factory=list)
    """Indices of the items that wait, by size and then by index."""
    results: list[Any] = field(default_factory=list)
    num_missing: int = 0
    started: float | None = None
    compute_ns: int = 0


@dataclass(frozen=True)
class _Batch:
    """Items that are computed together: (call, index within the call)."""

    members: list[tuple[_Call, int]]

    @property
    def calls(self) -> list[_Call]:
        return list(dict.fromkeys(call for call, _ in self.members))

    @property
    def sizes(self) -> list[int]:
        return [call.sizes[index] for call, index in self.members]


class Batcher(Generic[T, R]):
    """Turns concurrent calls into batches for one model.

    ``compute`` gets up to ``max_batch_tokens`` padded tokens (items x longest) and returns one
    result per item; it runs in the model thread. ``size`` is the tokens of an item, at least 1.
    Batchers that share ``thread`` compute one at a time; who made it starts and stops it.
    """

    def __init__(
        self,
        compute: Callable[[list[T]], list[R]],
        *,
        size: Callable[[T], int],
        max_batch_tokens: int,
        max_queued_tokens: int,
        service: str,
        model_name: str = "",
        thread: ModelThread | None = None,
    ) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.max_queued_tokens = max_queued_tokens
        self._compute = compute
        self._size = size
        self._service = service
        self._waiting: dict[_Call, None] = {}
        self._running: list[_Call] = []
        self._queued_tokens = 0
        self._thread = thread or ModelThread(service)
        self._owns_thread = thread is None
        self._shown = (0, 0, 0)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_accepting = False
        self._last_progress = time.monotonic()
        self._tokens_per_s = 0.0
        labels = (service, model_name)
        self._queue_requests = metrics.QUEUE_REQUESTS.labels(*labels)
        self._queue_tokens = metrics.QUEUE_TOKENS.labels(*labels)
        self._running_requests = metrics.RUNNING_REQUESTS.labels(*labels)
        self._queue_wait = metrics.QUEUE_WAIT_SECONDS.labels(*labels)
        self._compute_seconds = metrics.COMPUTE_SECONDS.labels(*labels)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the model; those being computed do not count."""
        return self._queued_tokens

    def heartbeat_age_s(self) -> float:
        """Seconds since the last sign of life; 0 when there is nothing to do."""
        if not (self._waiting or self._thread.is_busy):
            return 0.0
        return time.monotonic() - max(self._last_progress, self._thread.last_progress)

    async def start(self) -> None:
        """Begin to accept and compute."""
        self._is_accepting = True
        if self._owns_thread:
            self._thread.start()
        self._task = asyncio.create_task(self._serve(), name=f"batcher-{self._service}")

    async def stop(self) -> None:
        """Refuse new work, finish what is queued, end the model thread."""
        self._is_accepting = False
        if self._task is not None:
            self._wake.set()
            await self._task
            self._task = None
        if self._owns_thread:
            self._thread.stop()

    async def submit(self, items: Sequence[T], *, isolate: bool = False) -> BatchTiming[R]:
        """Compute ``items`` and return their results in order.

        With ``isolate`` they share no batch with other calls, and the same items are split into the
        same batches every time, so that the answer does not depend on other traffic.

        Raises Overloaded at once when they do not fit into the queue, InvalidRequest when they
        never could, DeadlineExceeded when the call's deadline passes in the queue, Unavailable
        after stop, and what ``compute`` raised for a batch that held one of them.
        """
        if not items:
            return BatchTiming([], 0, 0)
        call = self._admit(items, isolate)
        began = time.monotonic_ns()
        try:
            results = await call.future
        except asyncio.CancelledError:
            stage = "queued" if call.started is None else "computing"
            metrics.CANCELLED.labels(self._service, stage).inc()
            self._drop(call)
            raise
        elapsed_ns = time.monotonic_ns() - began
        return BatchTiming(results, max(elapsed_ns - call.compute_ns, 0), call.compute_ns)

    async def run(self, function: Callable[[], X]) -> X:
        """Run ``function`` on the model thread between two batches, before those that wait."""
        if not self._is_accepting:
            raise self._draining()
        return await self._thread.run(function)

    def _admit(self, items: Sequence[T], isolate: bool) -> _Call:
        if not self._is_accepting:
            raise self._draining()
        sizes = [self._size(item) for item in items]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        if sizes[largest] > self.max_batch_tokens:
            raise self._reject(
                "too_large",
                InvalidRequest(
                    f"item {largest} has {sizes[largest]} tokens; "
                    f"at most {self.max_batch_tokens} fit into one batch.",
                    field=f"items[{largest}]",
                ),
            )
        total = sum(sizes)
        if total > self.max_queued_tokens:
            raise self._reject(
                "too_large",
                InvalidRequest(
                    f"the request has {total} tokens; at most {self.max_queued_tokens} may wait: "
                    "send it in parts.",
                    field="items",
                ),
            )
        if self._queued_tokens + total > self.max_queued_tokens:
            raise self._reject(
                "queue_full",
                Overloaded(
                    f"the queue holds {self._queued_tokens} of at most {self.max_queued_tokens} "
                    f"tokens and the request has {total}; try again later.",
                    reason="QUEUE_FULL",
                    retry_after_s=self._retry_after_s(),
                ),
            )
        call = _Call(
            items,
            sizes,
            isolate,
            asyncio.get_running_loop().create_future(),
            deadline(),
            waiting=sorted(range(len(items)), key=lambda index: (sizes[index], index)),
            results=[None] * len(items),
            num_missing=len(items),
        )
        if not self._waiting and not self._thread.is_busy:
            self._last_progress = time.monotonic()
        self._waiting[call] = None
        self._queued_tokens += total
        self._show_queue()
        self._wake.set()
        item_tokens = metrics.ITEM_TOKENS.labels(self._service)
        for size in sizes:
            item_tokens.observe(size)
        return call

    async def _serve(self) -> None:
        while self._is_accepting or self._waiting:
            batch = self._next_batch()
            if batch is None:
                self._wake.clear()
                if self._is_accepting:
                    await self._wake.wait()
                continue
            await self._compute_batch(batch)

    async def _compute_batch(self, batch: _Batch) -> None:
        self._running = batch.calls
        now = time.monotonic()
        self._last_progress = now
        metrics.BATCHER_HEARTBEAT_TIMESTAMP.labels(self._service).set_to_current_time()
        for call in self._running:
            if call.started is None:
                call.started = now
                self._queue_wait.observe(now - call.enqueued)
        self._show_queue()
        items = [call.items[index] for call, index in batch.members]
        results: list[R] = []
        failure: BaseException | None = None
        try:
            results = await self._thread.run(lambda: self._compute_or_halve(items))
        except Exception as error:
            failure = error
        elapsed_s = time.monotonic() - now
        self._last_progress = time.monotonic()
        metrics.BATCHER_HEARTBEAT_TIMESTAMP.labels(self._service).set_to_current_time()
        self._running = []
        self._deliver(batch, results, failure, elapsed_s)
        self._show_queue()

    def _compute_or_halve(self, items: list[T]) -> list[R]:
        """``compute``; a batch that does not fit into memory is tried once more as two halves."""
        try:
            results = self._compute(items)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            if len(items) > 1:
                middle = len(items) // 2
                try:
                    return [*self._compute(items[:middle]), *self._compute(items[middle:])]
                except Exception as again:
                    if not _is_out_of_memory(again):
                        raise
            raise Overloaded(
                f"a batch of {len(items)} items, the longest of {max(map(self._size, items))} "
                "tokens, does not fit into memory; send shorter items or lower the server's "
                "max_batch_tokens.",
                reason="OUT_OF_MEMORY",
            ) from error
        assert len(results) == len(items), f"{len(results)} results for {len(items)} items"
        return results

    def _deliver(
        self, batch: _Batch, results: list[R], failure: BaseException | None, elapsed_s: float
    ) -> None:
        sizes = batch.sizes
        padded = len(sizes) * max(sizes)
        if failure is None:
            rate = padded / max(elapsed_s, 1e-9)
            self._tokens_per_s = (
                0.8 * self._tokens_per_s + 0.2 * rate if self._tokens_per_s else rate
            )
        self._compute_seconds.observe(elapsed_s)
        metrics.BATCH_ITEMS.labels(self._service).observe(len(sizes))
        metrics.BATCH_TOKENS.labels(self._service).observe(padded)
        metrics.BATCH_PADDING_RATIO.labels(self._service).observe(1 - sum(sizes) / padded)
        for call in batch.calls:
            call.compute_ns += int(elapsed_s * 1e9)
            if failure is not None:
                self._fail(call, failure)
        for (call, index), result in zip(batch.members, results, strict=False):
            call.results[index] = result
            call.num_missing -= 1
            if not call.num_missing and not call.future.done():
                call.future.set_result(call.results)

    def _next_batch(self) -> _Batch | None:
        """Take the next batch out of the queue, or None when nothing waits."""
        self._drop_expired()
        oldest = next(iter(self._waiting), None)
        if oldest is None:
            return None
        members: list[tuple[_Call, int]] = []
        if oldest.isolate:
            members = [(oldest, index) for index in oldest.waiting]
        else:
            for call in self._waiting:
                if not call.isolate:
                    members += [(call, index) for index in call.waiting]
                if len(members) >= WINDOW_ITEMS:
                    break
        seed = (oldest, oldest.waiting[-1])
        members.sort(key=lambda member: member[0].sizes[member[1]])
        chosen = choose_batch(
            [call.sizes[index] for call, index in members],
            members.index(seed),
            self.max_batch_tokens,
        )
        batch = _Batch(members[chosen])
        taken: dict[_Call, set[int]] = {}
        for call, index in batch.members:
            taken.setdefault(call, set()).add(index)
            self._queued_tokens -= call.sizes[index]
        for call, indices in taken.items():
            call.waiting = [index for index in call.waiting if index not in indices]
            if not call.waiting:
                del self._waiting[call]
        return batch

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for call in [c for c in self._waiting if c.deadline is not None and c.deadline <= now]:
            error = DeadlineExceeded("the call's deadline passed while it waited for the model.")
            self._fail(call, self._reject("deadline", error))

    def _fail(self, call: _Call, error: BaseException) -> None:
        self._drop(call)
        if not call.future.done():
            call.future.set_exception(error)

    def _drop(self, call: _Call) -> None:
        """Take the call's waiting items out of the queue; results of others will be discarded."""
        if call in self._waiting:
            del self._waiting[call]
            self._queued_tokens -= sum(call.sizes[index] for index in call.waiting)
            call.waiting = []
            self._show_queue()

    def _retry_after_s(self) -> float:
        """Time to compute half of the queue, at the speed seen so far."""
        if not self._tokens_per_s:
            return 1.0
        seconds = self._queued_tokens / 2 / self._tokens_per_s
        return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)

    def _show_queue(self) -> None:
        # By the difference: two revisions of a model have one gauge.
        now = (len(self._waiting), self._queued_tokens, len(self._running))
        gauges = (self._queue_requests, self._queue_tokens, self._running_requests)
        for gauge, value, shown in zip(gauges, now, self._shown, strict=True):
            gauge.inc(value - shown)
        self._shown = now

    def _reject(self, reason: str, error: Exception) -> Exception:
        metrics.REQUESTS_REJECTED.labels(self._service, reason).inc()
        return error

    def _draining(self) -> Exception:
        return self._reject(
            "draining",
            Unavailable(
                f"the {self._service} service is stopping; try another.", reason="DRAINING"
            ),
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Also torch's error, without importing torch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
