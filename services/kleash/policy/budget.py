"""How many tokens may wait in the queue of the decoding thread, and when to come back if too many.

Not how requests are ordered or decoded, which is kleash.policy.decode_loop.
"""

from __future__ import annotations

import threading

from kleash.rpc.errors import Overloaded

MIN_RETRY_S, MAX_RETRY_S = 0.1, 10.0
RETRY_UNKNOWN_S = 1.0
"""Before the first step, when no speed is known."""
SMOOTHING = 0.05
"""Weight of the newest step in the mean speed."""


class TokenBudget:
    """Tokens that the requests which wait may need; every method may be called from any thread."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self.num_tokens = 0
        """Of the requests that wait."""
        self._tokens_per_s = 0.0

    def take(self, num_tokens: int) -> None:
        """For a request that begins to wait. Raises Overloaded when there is no room for it."""
        with self._lock:
            if self.num_tokens + num_tokens > self._max_tokens:
                raise Overloaded(
                    f"the queue holds {self.num_tokens} of at most {self._max_tokens} tokens and "
                    f"the request may need {num_tokens}; try again later.",
                    reason="QUEUE_FULL",
                    retry_after_s=self._retry_after_s(),
                )
            self.num_tokens += num_tokens

    def give_back(self, num_tokens: int) -> None:
        """For requests that no longer wait."""
        with self._lock:
            self.num_tokens -= num_tokens

    def saw_step(self, num_tokens: int, seconds: float) -> None:
        """A step decoded so many tokens in this time."""
        rate = num_tokens / max(seconds, 1e-9)
        before = self._tokens_per_s or rate
        self._tokens_per_s = (1 - SMOOTHING) * before + SMOOTHING * rate

    def _retry_after_s(self) -> float:
        """Time to decode half of the queue, at the speed seen so far."""
        if not self._tokens_per_s:
            return RETRY_UNKNOWN_S
        return min(max(self.num_tokens / 2 / self._tokens_per_s, MIN_RETRY_S), MAX_RETRY_S)
