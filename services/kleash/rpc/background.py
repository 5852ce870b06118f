"""Work in threads: a function in its own, and the event loop of servers in the background."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any


def in_thread(function: Callable[[], Any]) -> asyncio.Future[Any]:
    """Run ``function`` in a daemon thread: a load that hangs must not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def finish(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, result, failure)

    threading.Thread(target=work, name="kleash-load", daemon=True).start()
    return future


_loop_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def background_loop() -> asyncio.AbstractEventLoop:
    """The event loop of every BackgroundServer, started at the first."""
    global _loop  # noqa: PLW0603
    with _loop_lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="kleash-servers", daemon=True).start()
        return _loop
