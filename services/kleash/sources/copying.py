"""Files of a remote folder into a local one: in parallel, resumed where an earlier try broke off.

PARTIAL/                 whatever arrived so far; every file is the beginning of the source's
PARTIAL/.plan.json       the source and its files' fingerprints: what changed is fetched again
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from kleash.base.durable import write_whole
from kleash.sources.errors import SourceUnavailable, cannot_write, damaged
from kleash.sources.marker import FetchedFile
from kleash.sources.remote import Remote, RemoteFile

logger = logging.getLogger(__name__)

PARALLEL_FILES = 4
TRIES = 5
"""Of one file without a new byte; the waits between them are 0.5, 1, 2 and 4 s."""
FIRST_WAIT_S = 0.5
PLAN = ".plan.json"


class _StoppedError(Exception):
    """Another file failed, so that this one is not needed any more."""


def copy_files(
    remote: Remote, files: Mapping[str, RemoteFile], partial: Path, *, source: str
) -> list[FetchedFile]:
    """Copy ``files`` into ``partial`` and return what was written, by name.

    Raises SourceUnavailable when a file broke off too often or had another length than announced;
    what arrived stays for the next try. UserError when it cannot be written, or is not there.
    """
    fingerprints = {name: file.fingerprint for name, file in files.items()}
    try:
        _follow_plan(fingerprints, partial, source=source)
    except OSError as error:
        raise cannot_write(partial.parent, error) from None
    stop = threading.Event()
    with ThreadPoolExecutor(PARALLEL_FILES) as threads:
        try:
            copies = [
                threads.submit(_copy_file, remote, name, file, partial / name, stop)
                for name, file in sorted(files.items())
            ]
            done, _ = wait(copies, return_when=FIRST_EXCEPTION)
            for copy in done:
                copy.result()
        except OSError as error:  # what a source raises is no OSError any more
            needed_bytes = bytes_missing(files, partial)
            raise cannot_write(partial.parent, error, needed_bytes=needed_bytes) from None
        finally:
            stop.set()
            threads.shutdown(cancel_futures=True)
    return [copy.result() for copy in copies]


def bytes_missing(files: Mapping[str, RemoteFile], partial: Path) -> int:
    """How much has still to be written, as far as the source tells sizes."""
    there = {path.name: path.stat().st_size for path in partial.glob("*")}
    return sum(max((it.num_bytes or 0) - there.get(name, 0), 0) for name, it in files.items())


def _follow_plan(fingerprints: Mapping[str, str], partial: Path, *, source: str) -> None:
    """Keep of an earlier try what still is the beginning of a file to come; all else goes."""
    path = partial / PLAN
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        known = earlier["fingerprints"] if earlier["source"] == source else None
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if known is None:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    for old in partial.iterdir():
        same = known is not None and known.get(old.name) == fingerprints.get(old.name, object())
        if not same:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    write_whole(path, json.dumps({"source": source, "fingerprints": dict(fingerprints)}))


class _Writer:
    """A file that grows at its end, and the hash of what is in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0
        file.seek(0)
        while piece := file.read(2**20):
            self._count(piece)

    def write(self, piece: bytes) -> None:
        self._file.write(piece)
        self._count(piece)

    def restart(self) -> None:
        self._file.truncate(0)
        self._sha256, self.num_bytes = hashlib.sha256(), 0

    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def _count(self, piece: bytes) -> None:
        self._sha256.update(piece)
        self.num_bytes += len(piece)


def _copy_file(
    remote: Remote, name: str, file: RemoteFile, target: Path, stop: threading.Event
) -> FetchedFile:
    with target.open("a+b") as opened:
        writer = _Writer(opened)
        _receive(remote, name, file, writer, stop)
    fetched = FetchedFile(name, writer.num_bytes, writer.sha256())
    is_git = file.digest.startswith("git:")
    found = f"git:{_git_hash(target)}" if is_git else f"sha256:{fetched.sha256}"
    if file.digest and file.digest != found:
        target.unlink()
        raise damaged(name, f"what arrived hashes to {found} and not to {file.digest}")
    return fetched


def _git_hash(path: Path) -> str:
    """What git calls a file with these bytes."""
    with path.open("rb") as file:
        named = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        return hashlib.file_digest(file, lambda: named).hexdigest()


def _receive(
    remote: Remote, name: str, file: RemoteFile, writer: _Writer, stop: threading.Event
) -> None:
    """Append what is missing; goes on after a break, and gives up after TRIES without a byte."""
    # Without a length or a fingerprint nobody can tell whether the beginning still fits.
    can_resume = file.num_bytes is not None and bool(file.fingerprint)
    if not can_resume or writer.num_bytes > (file.num_bytes or 0):
        writer.restart()
    failures = 0
    while writer.num_bytes != file.num_bytes:
        before = writer.num_bytes
        try:
            for piece in remote.pieces(name, file, before):
                if stop.is_set():
                    raise _StoppedError
                writer.write(piece)
            problem = _wrong_length(name, file, writer.num_bytes)
            if problem is None:
                return
        except SourceUnavailable as error:
            problem = error
        failures = 1 if writer.num_bytes > before and can_resume else failures + 1
        if failures == TRIES or writer.num_bytes > (file.num_bytes or writer.num_bytes):
            raise problem
        logger.info("%s; trying again", problem.what)
        stop.wait(FIRST_WAIT_S * 2 ** (failures - 1))
        if not can_resume:
            writer.restart()


def _wrong_length(name: str, file: RemoteFile, num_bytes: int) -> SourceUnavailable | None:
    if file.num_bytes in (None, num_bytes):
        return None
    return damaged(name, f"{num_bytes} bytes arrived, and the source announces {file.num_bytes}")
