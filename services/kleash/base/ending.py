"""Ends of a process that something would hold up: a slow clean-up, a library's call that hangs.

The kernel drops a signal with the default action for process 1, which a container's command is:
whoever hands a signal on to "what it did before" does nothing there. Statuses are a shell's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

_has_stuck_threads = threading.Event()


def end_at_once(number: int, _frame: FrameType | None = None) -> None:
    """Handler for the second SIGTERM or SIGINT, while the first one cleans up: status 128 + N."""
    with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
        text = f"error: ended at once by a second signal, {signal.Signals(number).name}.\n"
        os.write(2, text.encode())
    os._exit(128 + number)


def leave_stuck_threads() -> None:
    """Say that a thread may never return: the interpreter would wait for it at its end."""
    _has_stuck_threads.set()


def end_with(status: int) -> int:
    """``status`` for sys.exit(); does not return when a thread is stuck, but ends the process."""
    if _has_stuck_threads.is_set():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status
