"""Single keys from a terminal, without Enter."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty


class Keyboard:
    """Reads keys while it is entered; without a terminal there are none."""

    def __enter__(self) -> Keyboard:
        self._descriptor = sys.stdin.fileno() if sys.stdin.isatty() else None
        if self._descriptor is not None:
            self._before = termios.tcgetattr(self._descriptor)
            tty.setcbreak(self._descriptor)
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._descriptor is not None:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    @property
    def is_there(self) -> bool:
        """Whether there is a terminal."""
        return self._descriptor is not None

    def key(self, timeout_s: float) -> str:
        """The next key; empty when none is pressed in time."""
        if self._descriptor is None:
            time.sleep(timeout_s)
            return ""
        ready, _, _ = select.select([self._descriptor], [], [], timeout_s)
        return os.read(self._descriptor, 1).decode(errors="replace") if ready else ""
