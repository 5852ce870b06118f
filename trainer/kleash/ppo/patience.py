"""Waiting for a service that is away: growing pauses, and an end to them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from kleash.rpc.errors import (
    Cancelled,
    DeadlineExceeded,
    Overloaded,
    ServiceError,
    Unavailable,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

CURABLE_REASONS = ("DIGEST_MISMATCH", "WRONG_BASE", "NOT_STAGED", "QUARANTINED")
"""Of a publish: a replica that was restarted in between, bytes that were damaged on their way, or
weights that must come again."""

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0


def is_curable(error: ServiceError) -> bool:
    """Whether another attempt to bring weights to a replica may succeed."""
    is_away = isinstance(error, Unavailable | Overloaded | DeadlineExceeded | Cancelled)
    return is_away or error.reason in CURABLE_REASONS


class Patience:
    """Pauses between attempts: 0.2 s, doubling to 5 s, for ``seconds`` since the last success."""

    def __init__(
        self,
        seconds: float,
        is_over: Callable[[], bool] = lambda: False,
        *,
        log_level: int = logging.WARNING,
    ) -> None:
        self._seconds = seconds
        self._is_over = is_over
        self._log_level = log_level
        self.start_again()

    def start_again(self) -> None:
        """Something worked: the next failure gets the full patience."""
        self._deadline = time.monotonic() + self._seconds
        self._pause_s = FIRST_PAUSE_S

    def until_answered(self, ask: Callable[[], T]) -> T:
        """``ask`` until the service is there; raises what another attempt would not cure."""
        while True:
            try:
                return ask()
            except ServiceError as error:
                if not is_curable(error):
                    raise
                self.wait_after(error)

    def wait_after(self, error: ServiceError) -> None:
        """Sleep before the next attempt; raises ``error`` when the time is up or nobody waits."""
        pause_s = max(self._pause_s, error.retry_after_s or 0.0)
        if time.monotonic() + pause_s > self._deadline or self._is_over():
            raise error
        event = {"event": "Waiting"} if self._pause_s == FIRST_PAUSE_S else {}
        logger.log(self._log_level, "%s Trying again in %.1f s.", error, pause_s, extra=event)
        time.sleep(pause_s)
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
