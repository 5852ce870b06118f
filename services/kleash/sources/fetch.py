"""``kleash fetch``: a model folder from anywhere, whole or not at all.

OUT.partial fills up, is checked, gets ``kleash-fetch.json`` and is renamed to OUT: whoever sees OUT
sees a complete checkpoint. A fetch that was cut off goes on where it was; one that is done is not
done again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pydantic

from kleash.base.config import Config
from kleash.base.durable import flush_folder, flush_tree
from kleash.base.errors import ModelError, UserError
from kleash.base.lock_file import HeldError, take_lock
from kleash.sources.checkpoint import choose_files, missing_parts, pickled_files
from kleash.sources.copying import PLAN, bytes_missing, copy_files
from kleash.sources.errors import SourceUnavailable, cannot_write, no_space
from kleash.sources.marker import Marker, describe_file, digest_of, read_marker
from kleash.sources.patience import Calls, WatchedRemote, work_with_patience
from kleash.sources.remote import open_remote
from kleash.sources.uri import Source, parse_source
from kleash.sources.waiting import wait_for_checkpoint

logger = logging.getLogger(__name__)

TELL_EVERY_S = 10.0
TRY_AGAIN_S = 5.0
"""Between two tries at a source that does not answer, while there is time."""


class FetchConfig(Config):
    """Bring a model folder to this machine, or wait for one that somebody else brings."""

    source: str
    """Folder, hf://ORG/NAME@REVISION, s3://BUCKET/PATH, gs://BUCKET/PATH, https://HOST/PATH or what
    else fsspec reads."""
    out: Path | None = None
    """Folder to make; null, for a source that is a folder here: nothing is copied."""
    wait_s: float = pydantic.Field(default=0.0, ge=0)
    """Seconds to wait for the source: for a folder until it is complete, for others while they
    do not answer. 0 gives up at the first failure. A source that takes a call and stays silent
    counts as failed after two minutes."""
    needs_lineage: bool = False
    """The folder is one that Kleash writes: wait for its kleash.json, too."""
    sha256: str | None = pydantic.Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """What the files must be: the hash that a fetch of the same files printed. null takes any."""


@dataclass(frozen=True)
class Fetched:
    """What there is now."""

    folder: Path
    num_files: int
    num_bytes: int
    sha256: str
    is_new: bool
    """Whether this call brought it."""


def fetch(config: FetchConfig) -> Fetched:
    """Do what ``config`` says.

    Raises UserError when it cannot be done, SourceUnavailable when it could not be done in time,
    NoSpaceError for a full volume. The process ends with kleash.base.ending.end_with, as a call to
    the source may never return.
    """
    source = parse_source(config.source)
    started = time.monotonic()
    if source.kind == "folder":
        wait_for_checkpoint(source.path, wait_s=config.wait_s, needs_lineage=config.needs_lineage)
    if config.out is None:
        if source.kind != "folder":
            raise UserError(f"{source} has to be fetched to somewhere; give --out=FOLDER.")
        return _in_place(source.path, config.sha256)
    out = config.out.absolute()
    deadline = started + config.wait_s
    with _alone(out, deadline):
        if there := _already_there(source, out, config.sha256):
            return there
        logger.info("fetching %s to %s", source, out)
        with _ProgressLines(source, _partial(out)) as progress:
            calls = Calls()
            marker = work_with_patience(
                lambda: _try_until(
                    deadline, calls, lambda: _bring(source, out, config, progress, calls)
                ),
                calls,
                source=source.uri,
                deadline=deadline,
                wait_s=config.wait_s,
            )
    return Fetched(out, len(marker.files), marker.num_bytes, marker.sha256, is_new=True)


def _in_place(folder: Path, sha256: str | None) -> Fetched:
    names = choose_files(path.name for path in folder.iterdir())
    if sha256 is None:
        num_bytes = sum((folder / name).stat().st_size for name in names)
        return Fetched(folder, len(names), num_bytes, "", is_new=False)
    files = [describe_file(folder / name) for name in names]
    _check_sha256(str(folder), digest_of(files), sha256)
    num_bytes = sum(file.bytes for file in files)
    return Fetched(folder, len(files), num_bytes, sha256, is_new=False)


def _already_there(source: Source, out: Path, sha256: str | None) -> Fetched | None:
    """What an earlier fetch of the same source brought; a damaged one is made partial again."""
    if not out.exists():
        return None
    if out.is_dir() and not any(out.iterdir()):
        try:
            out.rmdir()
        except OSError:
            raise UserError(
                f"{out} cannot be replaced, as a mounted volume cannot; give --out={out}/NAME."
            ) from None
        return None
    marker = read_marker(out)
    if marker is None:
        raise UserError(f"{out} exists and no fetch made it; choose another --out or remove it.")
    if marker.source != source.uri:
        raise UserError(
            f"{out} holds {marker.source}, and not {source}; choose another --out, or remove it."
        )
    if damage := marker.damage(out):
        logger.warning("%s is damaged (%s) and is fetched again", out, damage)
        shutil.rmtree(out)
        return None
    _check_sha256(source.uri, marker.sha256, sha256)
    return Fetched(out, len(marker.files), marker.num_bytes, marker.sha256, is_new=False)


def _bring(
    source: Source, out: Path, config: FetchConfig, progress: _ProgressLines, calls: Calls
) -> Marker:
    """One try."""
    partial = _partial(out)
    with calls.one():
        remote = WatchedRemote(open_remote(source), calls)
    files = remote.list_files()
    chosen = {name: files[name] for name in _choose(source, list(files))}
    progress.total_bytes = sum(file.num_bytes or 0 for file in chosen.values())
    needed_bytes = bytes_missing(chosen, partial)
    if needed_bytes > shutil.disk_usage(partial.parent).free:  # better found before the first byte
        raise no_space(partial.parent, needed_bytes)
    copies = copy_files(remote, chosen, partial, source=source.uri)
    marker = Marker(source.uri, remote.revision, tuple(copies))
    try:
        if missing := missing_parts(partial, needs_lineage=config.needs_lineage):
            raise ModelError(
                f"{source} is no complete checkpoint: {', '.join(missing)}; upload what is "
                "missing, or give the folder of a model that save_pretrained() wrote."
            )
        _check_sha256(source.uri, marker.sha256, config.sha256)
    except UserError:
        shutil.rmtree(partial)  # whatever is wrong would be found again
        raise
    try:
        (partial / PLAN).unlink()
        marker.write(partial)
        flush_tree(partial)
        partial.rename(out)
        flush_folder(out.parent)
    except OSError as error:
        raise cannot_write(out, error) from None
    return marker


def _choose(source: Source, names: list[str]) -> list[str]:
    """Raises ModelError when there is no model among them that Kleash loads."""
    chosen = choose_files(names)
    if any(name.endswith(".safetensors") for name in chosen):
        return chosen
    if pickled := pickled_files(names):
        raise ModelError(
            f"{source} has pickled weights alone ({', '.join(pickled[:3])}), which can run code "
            "when they are loaded; give a revision or a copy with safetensors, as "
            "save_pretrained() writes them."
        )
    raise ModelError(f"{source} holds no *.safetensors weights; give the folder of a checkpoint.")


def _check_sha256(name: str, found: str, wanted: str | None) -> None:
    if wanted and found != wanted:
        raise ModelError(
            f"{name} has the hash {found}, and --sha256 is {wanted}: the files are other ones; "
            "find out who changed them, or change the hash."
        )


def _try_until(deadline: float, calls: Calls, bring: Callable[[], Marker]) -> Marker:
    while True:
        try:
            return bring()
        except SourceUnavailable as error:
            left = deadline - time.monotonic()
            if left <= 0 or calls.stopped.is_set():
                raise
            logger.warning("%s; trying again for %.0f s", error.what, left)
            calls.stopped.wait(min(TRY_AGAIN_S, left))


@contextlib.contextmanager
def _alone(out: Path, deadline: float) -> Iterator[None]:
    """One fetch at a time on an OUT that several pods share; the others wait for it."""
    path = out.with_name(f".{out.name}.lock")
    told = 0.0
    while True:
        try:
            lock = take_lock(path)
            break
        except HeldError as error:
            if time.monotonic() >= deadline:
                raise SourceUnavailable(
                    f"another fetch works on {out} ({error.holder})", "wait for it with --wait_s"
                ) from None
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                logger.info("waiting for another fetch of %s (%s)", out, error.holder)
            time.sleep(0.5)
        except OSError as error:
            raise cannot_write(out.parent, error) from None
    try:
        yield
    finally:
        os.close(lock)


class _ProgressLines:
    """A line every ten seconds about what has arrived."""

    def __init__(self, source: Source, partial: Path) -> None:
        self.total_bytes = 0
        """Of the model, once the source has told."""
        self._source, self._partial = source, partial
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> _ProgressLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        before = _bytes_below(self._partial)
        while not self._over.wait(TELL_EVERY_S):
            now, total = _bytes_below(self._partial), self.total_bytes
            rate = (now - before) / TELL_EVERY_S
            left = f", {(total - now) / rate:.0f} s left" if rate > 0 and total > now else ""
            logger.info(
                "fetching %s: %.2f of %.2f GB, %.1f MB/s%s",
                *(self._source, now / 1e9, total / 1e9, rate / 1e6, left),
            )
            before = now


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total
