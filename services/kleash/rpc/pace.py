"""How fast a model has been lately, and what that says of the work that waits for it."""

from __future__ import annotations

# Of the newest batch in the averages, and of the newest call.
WEIGHT, WAIT_WEIGHT = 0.2, 0.1
MAX_STRETCH = 4.0
# Estimates below it say more about the clock than about the queue.
SHORT_S = 0.1


class Pace:
    """Averages over the latest batches; knows nothing before the first."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        """Without padding; 0 before the first batch."""
        self._batch_tokens = 0.0
        self._stretch: dict[float, float] = {}

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

        Calls of more priority that come later, and all that takes time beside the model, count as
        they have counted of late for calls of this priority.
        """
        return self.seconds(tokens) * self._stretch.get(priority_s, 1.0)

    def learn_wait(self, tokens: float, priority_s: float, waited_s: float) -> None:
        """A call that ``tokens`` were to be computed before has waited so long, or longer."""
        expected_s = self.seconds(tokens)
        if expected_s > SHORT_S:
            stretch = self._stretch.get(priority_s, 1.0)
            stretch += WAIT_WEIGHT * (waited_s / expected_s - stretch)
            self._stretch[priority_s] = min(max(stretch, 1.0), MAX_STRETCH)

    def least_s(self, tokens: int) -> float:
        """What ``tokens`` take at least. Larger batches than of late may be faster per token, so
        that more tokens count as no more than one of those."""
        return self.seconds(min(tokens, self._batch_tokens))
