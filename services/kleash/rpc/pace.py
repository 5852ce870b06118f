"""How fast a model has been lately, and what that says of the work that waits for it."""

from __future__ import annotations

import math

# Of the newest batch in the averages, and of the newest call.
WEIGHT, WAIT_WEIGHT = 0.2, 0.1
MAX_STRETCH = 4.0
# Estimates below it say more about the clock than about the queue.
SHORT_S = 0.1
# Over which work that comes is averaged, and the most of the model that calls of more priority are
# taken to use: they are answered in any case, and may stop coming.
ARRIVAL_S, MAX_SHARE = 2.0, 0.75


class Pace:
    """Averages over the latest batches; knows nothing before the first."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        """Without padding; 0 before the first batch."""
        self._batch_tokens = 0.0
        self._stretch: dict[float, float] = {}
        self._arrivals: dict[float, _Rate] = {}

    def learn(self, tokens: int, elapsed_s: float) -> None:
        """A batch of ``tokens`` took ``elapsed_s``."""
        rate = tokens / max(elapsed_s, 1e-9)
        weight = WEIGHT if self.tokens_per_s else 1.0
        self.tokens_per_s += weight * (rate - self.tokens_per_s)
        self._batch_tokens += weight * (tokens - self._batch_tokens)

    def seconds(self, tokens: float) -> float:
        """To compute ``tokens`` in batches as of late; 0 when not known."""
        return tokens / self.tokens_per_s if self.tokens_per_s else 0.0

    @property
    def batch_tokens(self) -> float:
        """Of a batch as of late; 0 when not known."""
        return self._batch_tokens

    def wait_s(self, tokens: float, priority_s: float) -> float:
        """Until a call is done that ``tokens`` are computed before, its own included.

        Calls of more priority go on coming as they have of late, and are served first. What else
        has taken time counts as it has for calls of this priority.
        """
        return self._expected_s(tokens, priority_s) * self._stretch.get(priority_s, 1.0)

    def arrived(self, tokens: int, priority_s: float, now: float) -> None:
        """A call of ``tokens`` was let in at ``now``, a time in seconds that never goes back."""
        if priority_s not in self._arrivals:
            self._arrivals[priority_s] = _Rate(now)
        self._arrivals[priority_s].add(tokens, now)

    def look(self, now: float) -> None:
        """What has come counts less by now."""
        for rate in self._arrivals.values():
            rate.add(0, now)

    def learn_wait(self, tokens: float, priority_s: float, waited_s: float) -> None:
        """A call that ``tokens`` were to be computed before has waited so long, or longer."""
        expected_s = self._expected_s(tokens, priority_s)
        if expected_s > SHORT_S:
            stretch = self._stretch.get(priority_s, 1.0)
            stretch += WAIT_WEIGHT * (waited_s / expected_s - stretch)
            self._stretch[priority_s] = min(max(stretch, 1.0), MAX_STRETCH)

    def least_s(self, tokens: int) -> float:
        """What ``tokens`` take at least. Larger batches than of late may be faster per token, so
        that more tokens count as no more than one of those."""
        return self.seconds(min(tokens, self._batch_tokens))

    def least_tokens(self, tokens: int, batch_tokens: int) -> float:
        """As how many ``tokens`` may count, should batches of ``batch_tokens`` take no longer than
        those of late: all of them where batches are that large already."""
        if not 0 < self._batch_tokens < batch_tokens:
            return tokens
        return min(tokens, max(tokens * self._batch_tokens / batch_tokens, self._batch_tokens))

    def _expected_s(self, tokens: float, priority_s: float) -> float:
        ahead = sum(
            rate.per_s for priority, rate in self._arrivals.items() if priority > priority_s
        )
        share = min(ahead / self.tokens_per_s, MAX_SHARE) if self.tokens_per_s else 0.0
        return self.seconds(tokens) / (1.0 - share)


class _Rate:
    """A rate over about ARRIVAL_S, right from its beginning on."""

    def __init__(self, now: float) -> None:
        self.per_s = 0.0
        self._sum, self._weight, self._as_of = 0.0, 0.0, now

    def add(self, amount: float, now: float) -> None:
        """``amount`` came at ``now``."""
        fade = math.exp(-(now - self._as_of) / ARRIVAL_S)
        self._sum = self._sum * fade + amount
        self._weight = 1.0 - (1.0 - self._weight) * fade
        self._as_of = now
        # Early on a single call is no rate.
        self.per_s = self._sum / (ARRIVAL_S * max(self._weight, 0.25))
