"""Spans of what a batcher does for its calls: the wait of each, and one for each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kleash.base import tracing
from kleash.rpc.waiting_line import Batch, Call

X = TypeVar("X")


def record_wait(call: Call, until: float) -> None:
    """``call`` leaves the queue; times are those of time.monotonic()."""
    tracing.record_span(
        "queue", tracing.at_ns(call.enqueued), tracing.at_ns(until), parent=call.span
    )


def computing(batch: Batch, compute: Callable[[], X]) -> Callable[[], X]:
    """``compute`` of ``batch``, measured where it runs.

    One span, as the time is taken once whatever the number of calls: a child of the first call
    that is traced, with a link to each.
    """
    spans = [call.span for call in batch.calls if call.span is not None]
    if not spans:
        return compute

    def run() -> X:
        sizes = batch.sizes
        with tracing.span(
            "compute",
            parent=spans[0],
            links=spans,
            calls=len(batch.calls),
            items=len(sizes),
            tokens=sum(sizes),
            padded_tokens=len(sizes) * max(sizes),
        ):
            return compute()

    return run
