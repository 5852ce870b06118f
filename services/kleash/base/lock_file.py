"""A lock that one process at a time holds; the kernel lets go of it whatever way that one ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from kleash.base.errors import ConfigError, KleashError


class HeldError(KleashError):
    """Another process holds the lock; ``holder`` names it as it named itself."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by {holder}.")
        self.holder = holder


def take_lock(path: Path) -> int:
    """Lock ``path`` and return an open descriptor that holds the lock until it is closed.

    The folder of ``path`` is made if it is not there. Raises HeldError at once.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                os.close(descriptor)
                raise ConfigError(
                    f"{path} cannot be locked ({os.strerror(error.errno or 0)}): this volume has "
                    "no file locks; use one that has."
                ) from None
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise HeldError(path, holder) from None
        # The holder before may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)
