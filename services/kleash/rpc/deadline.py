"""The time by which the call being handled must be answered; set by the chassis, read by queues."""

from __future__ import annotations

import time
from contextvars import ContextVar

_deadline: ContextVar[float | None] = ContextVar("kleash_deadline", default=None)


def set_remaining_s(seconds: float) -> None:
    """Give the current task ``seconds`` from now."""
    _deadline.set(time.monotonic() + seconds)


def deadline() -> float | None:
    """When the current call expires, in time.monotonic() seconds; None outside of a call."""
    return _deadline.get()
