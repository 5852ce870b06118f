"""Files that are replaced while the process runs: certificates, keys and tokens that rotate."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from kleash.base.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHECK_S = 1.0
"""Between two looks at the files: a call or a handshake costs a comparison of clocks."""


class Reloading(Generic[T]):
    """What ``read`` makes of ``paths``, read again when one of the files has changed.

    Files that cannot be used (half-written, gone, a key of another certificate) are logged once,
    and what they held before stays in use. Safe to use from several threads.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """``read`` raises UserError for files that cannot be used; so does this, the first time."""
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._complaint = ""
        self._next_check = time.monotonic() + CHECK_S
        try:
            self._seen = self._look()
        except OSError as error:
            raise unreadable(error) from None
        self._value = read()

    def current(self) -> T:
        """The newest usable value; the same object as long as it does not change."""
        with self._lock:
            now = time.monotonic()
            if now >= self._next_check:
                self._next_check = now + CHECK_S
                self._check()
            return self._value

    def _check(self) -> None:
        try:
            # Looked at before it is read: what is written meanwhile is read the next time.
            seen = self._look()
            if seen != self._seen:
                value = self._read()
                if value != self._value:
                    self._value = value
                    logger.info("reloaded %s", self._names())
                self._seen = seen
            self._complaint = ""
        except (OSError, UserError) as error:
            complaint = str(unreadable(error) if isinstance(error, OSError) else error)
            if complaint != self._complaint:
                logger.warning("keeping the old %s: %s", self._names(), complaint)
            self._complaint = complaint

    def _look(self) -> list[tuple[int, int, int, int]]:
        """What tells one state of the files from another, links followed."""
        states = map(os.stat, self._paths)
        return [(s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states]

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))


def unreadable(error: OSError) -> ConfigError:
    """A file that cannot be read, as one sentence."""
    return ConfigError(f"cannot read {error.filename}: {error.strerror}.")
