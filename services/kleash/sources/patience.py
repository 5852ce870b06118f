"""Calls to a source that may never return, and how the process gets away from one.

A library's call cannot be ended from outside, and Python runs signal handlers in the main thread
alone, between two of its own instructions. So the work is done in a thread of its own:

main thread    waits ── SIGTERM, Ctrl-C or too long a silence ──► stop, wait LEAVE_S, leave the rest
worker         lists, reads, writes; what it asks of the source is told to Calls
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from kleash.base.ending import leave_stuck_threads
from kleash.sources.errors import SourceUnavailable
from kleash.sources.remote import Remote, RemoteFile

T = TypeVar("T")

SILENCE_S = 120.0
"""Without any answer until a call counts as hanging. Whole pieces are answers, and at 1 MB/s all
that are under way may take so long."""
LEAVE_S = 2.0
"""For a worker that is told to stop."""
_LOOK_EVERY_S = 0.2


class StoppedError(Exception):
    """Nobody waits for the work any more."""


class Calls:
    """What is asked of a source now, from any thread."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._began: dict[object, float] = {}
        self._last_answer = 0.0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Around a call. Raises StoppedError after it when nobody waits any more."""
        call = object()
        with self._lock:
            self._began[call] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._began[call]
                self._last_answer = time.monotonic()
        if self.stopped.is_set():
            raise StoppedError

    def silent_s(self) -> float:
        """Seconds since an answer, of any call, while at least one is waited for; else 0."""
        with self._lock:
            if not self._began:
                return 0.0
            return time.monotonic() - max(self._last_answer, min(self._began.values()))


class WatchedRemote:
    """A remote whose calls are told to ``calls``."""

    def __init__(self, remote: Remote, calls: Calls) -> None:
        self._remote, self._calls = remote, calls

    @property
    def revision(self) -> str:
        return self._remote.revision

    def list_files(self) -> dict[str, RemoteFile]:
        with self._calls.one():
            return self._remote.list_files()

    def pieces(self, name: str, file: RemoteFile, start: int) -> Iterator[bytes]:
        pieces = self._remote.pieces(name, file, start)
        while True:
            with self._calls.one():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece


def work_with_patience(
    work: Callable[[], T], calls: Calls, *, source: str, deadline: float, wait_s: float
) -> T:
    """What ``work`` returns or raises. It is left after ``deadline`` when its source is silent.

    Raises SourceUnavailable then. Its thread may be stuck for good: the process has to end with
    kleash.base.ending.end_with.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        done.set()

    worker = threading.Thread(target=run, name="kleash-fetch", daemon=True)
    worker.start()
    try:
        while not done.wait(_LOOK_EVERY_S):
            if time.monotonic() >= deadline and calls.silent_s() >= SILENCE_S:
                raise SourceUnavailable(
                    f"{source} took the call and was silent for {SILENCE_S:g} s, {wait_s:g} s of "
                    "waiting included",
                    "see whether it answers other clients and whether a proxy is in between, or "
                    "wait longer with --wait_s",
                )
    except BaseException:
        calls.stopped.set()
        if not done.wait(LEAVE_S):
            leave_stuck_threads()
        raise
    if errors:
        raise errors[0]
    return results[0]
