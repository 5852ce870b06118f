"""Objects on their way to a replica: files on its disk that can be read while they grow.

    Fetch from publisher or peer ──► append ──► [▓▓▓▓▓▓▓▓░░░░░░░] ──► read, wait ──► Fetch by a peer
                                                        ▲ available
                                                  complete ──► view: mapped, not copied into memory

The folder is scratch: what an earlier process left in it is removed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kleash.rpc.errors import NotFound, Overloaded, ServiceError, Unavailable

logger = logging.getLogger(__name__)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SpoolObject:
    """One object's bytes in a file, written in order by one thread and read by many."""

    def __init__(self, path: Path, size: int) -> None:
        """Reserves ``size`` bytes, so that a disk that is too full tells now.

        Raises Overloaded (SPOOL_FULL).
        """
        self.path = path
        self.size = size
        self.available = 0
        self._failure: ServiceError | None = None
        self._is_claimed = True
        self._grown = threading.Condition()
        self._map: mmap.mmap | None = None
        with _disk(path, size):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            # Closed when nobody reads any more: a number that is used again would be another file.
            weakref.finalize(self, os.close, self._descriptor)
            if size:
                _reserve(self._descriptor, size)

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are here."""
        return self.available == self.size

    def claim(self) -> bool:
        """Become the one thread that fills it; False when another does."""
        with self._grown:
            is_free, self._is_claimed = not self._is_claimed, True
            return is_free

    def release(self) -> None:
        """Somebody else may fill it."""
        with self._grown:
            self._is_claimed = False

    def append(self, data: bytes | memoryview) -> None:
        """Add the next bytes. Raises Overloaded (SPOOL_FULL)."""
        assert self.available + len(data) <= self.size, "more bytes than the object has"
        with _disk(self.path, self.size):
            view, offset = memoryview(data), self.available
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        with self._grown:
            self.available += len(data)
            self._grown.notify_all()

    def fail(self, error: ServiceError) -> None:
        """Nothing more will come: readers that wait get ``error``."""
        with self._grown:
            self._failure = error
            self._grown.notify_all()

    def revive(self) -> None:
        """Another attempt to fill it begins."""
        with self._grown:
            self._failure = None

    def read(self, offset: int, size: int, timeout_s: float) -> bytes:
        """At most ``size`` bytes from ``offset``, waiting until there are some; empty at the end.

        Raises Unavailable when none came within ``timeout_s``, and what ``fail`` was told.
        """
        with self._grown:
            self._grown.wait_for(
                lambda: self.available > offset or self.is_complete or self._failure, timeout_s
            )
            end = min(self.available, offset + size)
            if end <= offset:
                if self.is_complete:
                    return b""
                raise self._failure or Unavailable(
                    f"no byte after {offset} of {self.size} came within {timeout_s:g} s; "
                    "fetch from another source.",
                    reason="SOURCE_STALLED",
                )
        return os.pread(self._descriptor, end - offset, offset)

    def view(self) -> np.ndarray:
        """All bytes, flat uint8, mapped from the file: the kernel may drop the pages."""
        assert self.is_complete, "view of an object that is not complete"
        if not self.size:
            return np.empty(0, np.uint8)
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        """Remove the file. Who still reads it goes on."""
        self.fail(NotFound("the object is not kept any more; ask for a new plan."))
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:  # a commit must not fail for a file that nobody needs
            logger.warning("cannot remove %s: %s", self.path, error.strerror)


class Spool:
    """A folder of objects by id."""

    def __init__(self, folder: Path | None) -> None:
        """``folder`` is made, and emptied; None makes a temporary one that goes with the spool."""
        self.folder = folder or Path(tempfile.mkdtemp(prefix="kleash-weights-"))
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.object"):
            left.unlink()
        self._objects: dict[bytes, SpoolObject] = {}
        self._lock = threading.Lock()
        self._count = 0

    def create(self, object_id: bytes, size: int) -> SpoolObject:
        """An object for the caller to fill, which may have begun to arrive; or a complete one.

        One that another thread still fills is left to it. Raises Overloaded (SPOOL_FULL).
        """
        with self._lock:
            known = self._objects.get(object_id)
            if known is not None and known.size == size and (known.is_complete or known.claim()):
                return known
            if known is not None:
                known.close()
            made = SpoolObject(self._path(), size)
            self._objects[object_id] = made
            return made

    def scratch(self, size: int) -> SpoolObject:
        """An object without an id, for the caller alone to close. Raises Overloaded."""
        with self._lock:
            return SpoolObject(self._path(), size)

    def get(self, object_id: bytes) -> SpoolObject:
        """The object of that id. Raises NotFound."""
        with self._lock:
            if object_id not in self._objects:
                raise NotFound(
                    f"object {object_id.hex()[:12]} is not here; ask the publisher for a plan.",
                    reason="UNKNOWN_OBJECT",
                )
            return self._objects[object_id]

    def drop(self, object_id: bytes) -> None:
        """Forget an object, if it is here."""
        with self._lock:
            if known := self._objects.pop(object_id, None):
                known.close()

    def keep_only(self, object_ids: set[bytes]) -> None:
        """Forget every other object."""
        with self._lock:
            for object_id in self._objects.keys() - object_ids:
                self._objects.pop(object_id).close()

    def close(self) -> None:
        """Forget everything."""
        self.keep_only(set())

    def _path(self) -> Path:
        # A name of its own: a reader of an object that was dropped may still hold the old file.
        self._count += 1
        return self.folder / f"{self._count:08d}.object"


def _reserve(descriptor: int, size: int) -> None:
    disk = os.fstatvfs(descriptor)
    if size > disk.f_bavail * disk.f_frsize:
        # Without this the file takes all that is left before it fails, and others cannot write.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.posix_fallocate(descriptor, 0, size)


@contextlib.contextmanager
def _disk(path: Path, size: int) -> Iterator[None]:
    """Turn a full disk into the error that callers are told."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        path.unlink(missing_ok=True)
        raise Overloaded(
            f"the disk of {path.parent} has no room for {size} bytes of weights "
            f"({os.strerror(error.errno)}); free some, or set policy.weights.spool to another.",
            reason="SPOOL_FULL",
        ) from None
