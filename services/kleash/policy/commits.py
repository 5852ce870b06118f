"""Changes of weights that wait for their turn in the decoding thread; the loop carries them out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from kleash.rpc.errors import DeadlineExceeded

InFlight = Literal["drain", "keep", "reprefill", "abort_partial"]
"""What happens to responses that are being generated at a commit; weights.proto describes each."""

X = TypeVar("X")


@dataclass(frozen=True)
class Committed(Generic[X]):
    """A commit that was carried out."""

    result: X
    """What the function of the commit returned."""
    pause_ns: int
    """For how long no step was made, in nanoseconds. While a drain waits, steps are made."""


@dataclass(frozen=True, eq=False)
class Commit(Generic[X]):
    """A function that changes the weights, and what happens to the rows around it."""

    function: Callable[[], X]
    mode: InFlight
    timeout_s: float | None
    """Most seconds until the function starts; None waits for as long as it takes."""
    future: Future[Committed[X]] = field(default_factory=Future)
    asked_at: float = field(default_factory=time.monotonic)

    @property
    def is_expired(self) -> bool:
        """Whether it has waited for too long."""
        return self.timeout_s is not None and time.monotonic() - self.asked_at > self.timeout_s


class CommitQueue:
    """Commits in the order in which they were asked for. Used by the decoding thread alone."""

    def __init__(self) -> None:
        self._commits: deque[Commit[Any]] = deque()

    @property
    def is_draining(self) -> bool:
        """Whether no waiting response may start, so that the running ones come to an end."""
        return bool(self._commits) and self._commits[0].mode == "drain"

    def put(self, commit: Commit[Any]) -> None:
        """Let ``commit`` wait behind the others."""
        self._commits.append(commit)

    def pop_due(self, num_active: int) -> Commit[Any] | None:
        """The first commit, if it can start now; its future can no longer be cancelled.

        Those that were cancelled leave, and so do those that have waited for too long.
        """
        for commit in list(self._commits):
            if commit.future.cancelled():
                self._commits.remove(commit)
            elif commit.is_expired:
                self._commits.remove(commit)
                _fail(commit, _timed_out(commit, num_active))
        while self._commits and not (self.is_draining and num_active):
            commit = self._commits.popleft()
            if commit.future.set_running_or_notify_cancel():
                return commit
        return None

    def refuse(self, error: Exception) -> None:
        """Fail all of them."""
        while self._commits:
            _fail(self._commits.popleft(), error)


def _fail(commit: Commit[Any], error: Exception) -> None:
    if commit.future.set_running_or_notify_cancel():
        commit.future.set_exception(error)


def _timed_out(commit: Commit[Any], num_active: int) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the commit could not start within {commit.timeout_s:g} s, and {num_active} responses are "
        "still running; nothing was changed. Allow more time, or do not drain.",
        reason="NOT_DRAINED",
    )
