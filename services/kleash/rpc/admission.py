"""Which calls may wait for a model: those that fit into the queue and will be done in time.

Nothing that it would answer late is let in, and what the calls that go first have made late leaves
the line while its caller has time to ask somebody else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from kleash.base import metrics
from kleash.rpc.errors import DeadlineExceeded, InvalidRequest, Overloaded
from kleash.rpc.pace import Pace
from kleash.rpc.quota import Account
from kleash.rpc.waiting_line import WINDOW_BATCHES, Call, WaitingLine

# Of the time until its deadline that a call may be expected to take: estimates are off, and the
# answer travels.
TIME_SHARE = 0.8
# Bounds of the retry hint.
MIN_RETRY_S, MAX_RETRY_S = 0.1, 10.0


class Admission:
    """Of the calls of one batcher; errors are counted by their reasons."""

    def __init__(
        self,
        waiting: WaitingLine,
        pace: Pace,
        *,
        max_batch_tokens: int,
        max_queued_tokens: int,
        service: str,
    ) -> None:
        self._waiting = waiting
        self._pace = pace
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._service = service

    def check_size(self, call: Call, its: Account | None) -> None:
        """Raise what keeps a call out that does not fit into a batch, or into the queue."""
        sizes, total = call.sizes, call.tokens_waiting
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        if sizes[largest] > self._max_batch_tokens:
            raise self.reject(
                "too_large",
                InvalidRequest(
                    f"item {largest} has {sizes[largest]} tokens; "
                    f"at most {self._max_batch_tokens} fit into one batch.",
                    field=f"items[{largest}]",
                ),
            )
        limit = int(self._max_queued_tokens * (its.queue_share if its is not None else 1.0))
        if total > limit:
            raise self.reject(
                "too_large",
                InvalidRequest(
                    f"the request has {total} tokens; at most {limit} may wait: send it in parts.",
                    field="items",
                ),
            )
        if self._waiting.tokens + total > limit:
            raise self.reject(
                "queue_full",
                Overloaded(
                    f"the queue holds {self._waiting.tokens} of at most {limit} "
                    f"tokens and the request has {total}; try again later.",
                    reason="QUEUE_FULL",
                    retry_after_s=self._retry_after_s(),
                ),
            )

    def check_time(self, call: Call, running_tokens: int, batch_tokens: int) -> None:
        """Raise Overloaded for a call that would not be done by its deadline.

        What is before it, the running batch, and the company that it will have in its batches count
        at the pace of late. The pace may be that of tiny batches, though: the call's own tokens
        count as if batches of ``batch_tokens``, which it could fill, took as long as those of late,
        and a call that nothing is before is always tried.
        """
        if call.deadline is None or not (self._waiting or running_tokens):
            return
        now = time.monotonic()
        self._pace.look(now)
        tokens = running_tokens + self._waiting.tokens_before(call) + call.tokens_waiting
        call.tokens_before = tokens + WINDOW_BATCHES * self._pace.batch_tokens
        saved = call.tokens_waiting - self._pace.least_tokens(call.tokens_waiting, batch_tokens)
        needed_s = self._pace.wait_s(call.tokens_before - saved, call.priority_s)
        left_s = max(call.deadline - now, 0.0)
        if needed_s <= TIME_SHARE * left_s:
            return
        raise self.reject(
            "late",
            Overloaded(
                f"the call would take about {needed_s:.1f} s, as {tokens} tokens would be computed "
                f"by then, and its deadline is in {left_s:.1f} s; allow more time or try again "
                "later.",
                reason="LATE",
                retry_after_s=_within_bounds(needed_s - TIME_SHARE * left_s),
            ),
        )

    def late(self, now: float) -> Iterator[tuple[Call, Exception]]:
        """Calls in the line that would not be done in time any more, with what to tell them."""
        tokens_before = 0
        for call in self._waiting:
            needed_s = self._pace.least_s(call.tokens_waiting)
            if tokens_before:  # and a batch with its items in the company of others
                needed_s = self._pace.seconds(tokens_before + self._pace.batch_tokens)
            if call.deadline is None or call.deadline > now + needed_s:
                tokens_before += call.tokens_waiting
            else:
                yield call, self._too_late(call.deadline - now, needed_s)

    def _too_late(self, left_s: float, needed_s: float) -> Exception:
        if left_s <= 0:
            return self.reject(
                "deadline",
                DeadlineExceeded("the call's deadline passed while it waited for the model."),
            )
        return self.reject(
            "late",
            Overloaded(
                f"calls that go first have come meanwhile: this one would take another "
                f"{needed_s:.1f} s, and its deadline is in {left_s:.1f} s; allow more time or try "
                "again later.",
                reason="LATE",
                retry_after_s=_within_bounds(needed_s - left_s),
            ),
        )

    def _retry_after_s(self) -> float:
        """Time to compute half of the queue, at the speed seen so far."""
        if not self._pace.tokens_per_s:
            return 1.0
        return _within_bounds(self._pace.seconds(self._waiting.tokens / 2))

    def reject(self, reason: str, error: Exception) -> Exception:
        """``error``, counted as a refusal for ``reason``."""
        metrics.REQUESTS_REJECTED.labels(self._service, reason).inc()
        return error


def _within_bounds(retry_after_s: float) -> float:
    return min(max(retry_after_s, MIN_RETRY_S), MAX_RETRY_S)
