"""One queue and one model thread for all callers of a service.

    submit() ─► admission: tokens, ─► waiting calls ──► next batch ─► model thread ─► results
                time, quota           by precedence;    sorted by     compute()       one future
                no room: Overloaded   gone or late:     length                        a call
                                      dropped here

Everything but ``compute`` runs on the event loop. A batch is the largest one at hand: nothing waits
for company. Which calls it serves is in waiting_line.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kleash.base import metrics
from kleash.base.exemplar import exemplar_of
from kleash.rpc.admission import Admission
from kleash.rpc.batch_spans import computing, record_wait
from kleash.rpc.deadline import deadline
from kleash.rpc.errors import Overloaded, Unavailable
from kleash.rpc.model_thread import ModelThread
from kleash.rpc.pace import Pace
from kleash.rpc.quota import account
from kleash.rpc.waiting_line import Batch, Call, WaitingLine

T = TypeVar("T")
R = TypeVar("R")
X = TypeVar("X")

# A batch is made no longer than this, at the pace of late, once it has so many tokens.
BATCH_S, MIN_BATCH_TOKENS = 0.5, 2048
# A call that was dropped would have waited longer, nobody knows how much.
DROPPED = 2.0
# By which the clocks of gRPC and of deadlines may differ.
CLOCK_S = 0.05


@dataclass(frozen=True)
class BatchTiming(Generic[R]):
    """Results of one submit, in its order, and where its time went."""

    results: list[R]
    queue_ns: int
    """Waiting, for the model and for batches without this call."""
    compute_ns: int
    """Wall time of the batches that held its items."""


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
        self._waiting = WaitingLine()
        self._running: list[Call] = []
        self._running_tokens = 0
        self._thread = thread or ModelThread(service)
        self._owns_thread = thread is None
        self._shown = (0, 0, 0)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_accepting = False
        self._last_progress = time.monotonic()
        self._pace = Pace()
        self._admission = Admission(
            self._waiting,
            self._pace,
            max_batch_tokens=max_batch_tokens,
            max_queued_tokens=max_queued_tokens,
            service=service,
        )
        self._ended: float | None = None
        """When the last batch ended, while calls have waited ever since."""
        labels = (service, model_name)
        self._queue_requests = metrics.QUEUE_REQUESTS.labels(*labels)
        self._queue_tokens = metrics.QUEUE_TOKENS.labels(*labels)
        self._running_requests = metrics.RUNNING_REQUESTS.labels(*labels)
        self._queue_wait = metrics.QUEUE_WAIT_SECONDS.labels(*labels)
        self._compute_seconds = metrics.COMPUTE_SECONDS.labels(*labels)
        metrics.QUEUE_LIMIT_TOKENS.labels(*labels).set(max_queued_tokens)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the model; those being computed do not count."""
        return self._waiting.tokens

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

        Raises Overloaded at once when they do not fit into the queue, when they would not be done
        by the call's deadline, or when the caller's quota is used up, and later when calls that go
        first make them late; InvalidRequest when they never could fit, DeadlineExceeded when the
        deadline passes in the queue, Unavailable after stop, and what ``compute`` raised for a
        batch that held one of them.
        """
        if not items:
            return BatchTiming([], 0, 0)
        call = self._admit(items, isolate)
        began = time.monotonic_ns()
        try:
            results = await call.future
        except asyncio.CancelledError:
            if call.deadline is not None and call.deadline <= time.monotonic() + CLOCK_S:
                self._learn_wait(call, DROPPED)  # gRPC ends a call at its deadline
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

    def check_turn(self) -> None:
        """Raise Overloaded when a call that comes now would be refused whatever it holds.

        To refuse many calls costs little this way, as they need not be tokenized.
        """
        if self._waiting and self._is_accepting:
            self._check_time(self._call([], isolate=False))

    def _call(self, items: Sequence[T], *, isolate: bool) -> Call:
        its = account()
        return Call(
            items,
            [self._size(item) for item in items],
            isolate,
            asyncio.get_running_loop().create_future(),
            deadline(),
            priority_s=its.priority_s if its is not None else 0.0,
        )

    def _check_time(self, call: Call) -> None:
        self._admission.check_time(call, self._running_tokens, self._batch_tokens())

    def _admit(self, items: Sequence[T], isolate: bool) -> Call:
        if not self._is_accepting:
            raise self._draining()
        its, call = account(), self._call(items, isolate=isolate)
        self._admission.check_size(call, its)
        self._check_time(call)
        if its is not None:
            try:
                its.take(call.tokens_waiting)
            except Overloaded as error:
                raise self._admission.reject("quota", error) from None
        if not self._waiting and not self._thread.is_busy:
            self._last_progress = time.monotonic()
        self._waiting.add(call)
        self._pace.arrived(call.tokens_waiting, call.priority_s, call.enqueued)
        self._show_queue()
        self._wake.set()
        item_tokens = metrics.ITEM_TOKENS.labels(self._service)
        for size in call.sizes:
            item_tokens.observe(size)
        return call

    async def _serve(self) -> None:
        while self._is_accepting or self._waiting:
            self._drop_late()
            batch = self._waiting.next_batch(self.max_batch_tokens, self._batch_tokens())
            if batch is None:
                self._wake.clear()
                if self._is_accepting:
                    await self._wake.wait()
                continue
            await self._compute_batch(batch)

    async def _compute_batch(self, batch: Batch) -> None:
        self._running = batch.calls
        self._running_tokens = sum(batch.sizes)
        now = time.monotonic()
        self._last_progress = now
        metrics.BATCHER_HEARTBEAT_TIMESTAMP.labels(self._service).set_to_current_time()
        for call in self._running:
            if call.started is None:
                call.started = now
                self._queue_wait.observe(now - call.enqueued, exemplar_of(call.span))
                record_wait(call, now)
        self._show_queue()
        items = [call.items[index] for call, index in batch.members]
        results: list[R] = []
        failure: BaseException | None = None
        try:
            results = await self._thread.run(
                computing(batch, lambda: self._compute_or_halve(items))
            )
        except Exception as error:
            failure = error
        ended = self._last_progress = time.monotonic()
        gap_s = now - self._ended if self._ended is not None else 0.0
        self._ended = ended if self._waiting else None
        metrics.BATCHER_HEARTBEAT_TIMESTAMP.labels(self._service).set_to_current_time()
        self._running, self._running_tokens = [], 0
        self._deliver(batch, results, failure, elapsed_s=ended - now, gap_s=gap_s)
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
        self,
        batch: Batch,
        results: list[R],
        failure: BaseException | None,
        *,
        elapsed_s: float,
        gap_s: float,
    ) -> None:
        sizes = batch.sizes
        padded = len(sizes) * max(sizes)
        if failure is None:
            self._pace.learn(sum(sizes), elapsed_s + gap_s)
        traced = next((call.span for call in batch.calls if call.span is not None), None)
        self._compute_seconds.observe(elapsed_s, exemplar_of(traced))
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
                self._learn_wait(call)
                call.future.set_result(call.results)

    def _batch_tokens(self) -> int:
        """Of the next batch. One that takes seconds would gain nothing and hold everybody up."""
        if not self._pace.tokens_per_s:
            return self.max_batch_tokens
        wanted = int(BATCH_S * self._pace.tokens_per_s)
        return min(max(wanted, MIN_BATCH_TOKENS), self.max_batch_tokens)

    def _drop_late(self) -> None:
        for call, error in list(self._admission.late(time.monotonic())):
            self._learn_wait(call, DROPPED)
            self._fail(call, error)

    def _learn_wait(self, call: Call, factor: float = 1.0) -> None:
        waited_s = factor * (time.monotonic() - call.enqueued)
        self._pace.learn_wait(call.tokens_before, call.priority_s, waited_s)

    def _fail(self, call: Call, error: BaseException) -> None:
        self._drop(call)
        if not call.future.done():
            call.future.set_exception(error)

    def _drop(self, call: Call) -> None:
        """Take the call's waiting items out of the queue; results of others will be discarded."""
        if self._waiting.remove(call):
            self._show_queue()

    def _show_queue(self) -> None:
        # By the difference: two revisions of a model have one gauge.
        now = (len(self._waiting), self._waiting.tokens, len(self._running))
        gauges = (self._queue_requests, self._queue_tokens, self._running_requests)
        for gauge, value, shown in zip(gauges, now, self._shown, strict=True):
            gauge.inc(value - shown)
        self._shown = now

    def _draining(self) -> Exception:
        return self._admission.reject(
            "draining",
            Unavailable(
                f"the {self._service} service is stopping; try another.", reason="DRAINING"
            ),
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Also torch's error, without importing torch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
