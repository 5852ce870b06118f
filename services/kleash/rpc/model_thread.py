"""The one thread that touches a model. The event loop hands it work, one piece at a time.

A daemon thread: a model that hangs must not keep a stopped process alive.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

X = TypeVar("X")

_Job = tuple[Callable[[], Any], asyncio.Future[Any], asyncio.AbstractEventLoop]


class ModelThread:
    """Runs functions in order in a thread of its own."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._num_open = 0
        self._name = name
        self._thread: threading.Thread | None = None
        self.last_progress = time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Whether a function runs or waits to run."""
        return self._num_open > 0

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(
            target=self._serve, name=f"kleash-{self._name}-model", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the work that it has; does not wait."""
        self._jobs.put(None)

    async def run(self, function: Callable[[], X]) -> X:
        """Run ``function`` in the thread. Cancelled before its turn, it does not run at all."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[X] = loop.create_future()
        if not self.is_busy:
            self.last_progress = time.monotonic()
        self._num_open += 1
        self._jobs.put((function, future, loop))
        return await future

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            function, future, loop = job
            result: Any = None
            failure: Exception | None = None
            self.last_progress = time.monotonic()
            if not future.cancelled():
                try:
                    result = function()
                except Exception as error:
                    failure = error
                except BaseException as error:
                    failure = RuntimeError(f"{error!r} in the model thread")
            self.last_progress = time.monotonic()
            try:
                loop.call_soon_threadsafe(self._finish, future, result, failure)
            except RuntimeError:  # the loop was closed while the function ran: nobody waits
                return

    def _finish(self, future: asyncio.Future[Any], result: Any, failure: Exception | None) -> None:
        self._num_open -= 1
        if future.done():
            return
        if failure is None:
            future.set_result(result)
        elif isinstance(failure, StopIteration):  # a future refuses it, and its caller would hang
            future.set_exception(RuntimeError("StopIteration in the model thread"))
        else:
            future.set_exception(failure)
