"""Folders on other machines: what is in them, and the bytes of a file from any place on.

    list_files()            name -> size and a fingerprint that changes when the file does
    pieces(name, start)     the bytes from ``start`` to the end, in order

Both raise UserError when another try would end the same way, and SourceUnavailable otherwise.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from kleash.base.errors import ConfigError, KleashError, ModelError
from kleash.sources.errors import denied, not_found, unavailable
from kleash.sources.uri import FORMS, Source

PIECE_BYTES = 8 * 2**20
"""Of one request to an object store."""
PIECES_AHEAD = 4
"""Requests under way for one file: one alone does not fill the line to an object store."""

GCS_RETRY_S = 30
"""A try that gets no answer at all still ends by the library's own limit alone, 120 s."""

_DENIED = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_\w+|UNRECOGNIZED_CLIENT|SIGNATURE_DOES_NOT_MATCH|"
    r"MISSING_AUTHENTICATION_TOKEN|REQUEST_EXPIRED)|HTTP status 40[13]\b|ExpiredToken|"
    r"Permission ?denied|PERMISSION_DENIED|UNAUTHENTICATED",
    re.IGNORECASE,
)
_NOT_FOUND = re.compile(r"AWS Error (NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND)|NOT_FOUND")
_REQUEST_ID = re.compile(r" ?\(Request ID: [^)]*\)")


@dataclass(frozen=True)
class RemoteFile:
    """What a source says about a file."""

    num_bytes: int | None
    """None where it does not say."""
    fingerprint: str
    """Another one means other bytes; empty where the source has none."""
    digest: str = ""
    """What the bytes must hash to: sha256:HEX, or git:HEX for git's hash of a blob."""


class Remote(Protocol):
    """A folder elsewhere."""

    @property
    def revision(self) -> str:
        """The commit that was listed; empty where there are none."""
        ...

    def list_files(self) -> dict[str, RemoteFile]: ...

    def pieces(self, name: str, file: RemoteFile, start: int) -> Iterator[bytes]: ...


def open_remote(source: Source) -> Remote:
    """The folder that ``source`` names; nothing is asked of it yet."""
    if source.kind == "http":
        from kleash.sources.web import WebFolder

        return WebFolder(source.uri)
    if source.kind == "hub":
        from kleash.sources.hub import HubFolder

        return HubFolder(source)
    if source.kind == "fsspec":
        return _FsspecFolder(source.uri)
    return _ArrowFolder(source.uri if source.kind == "arrow" else source.path.resolve().as_uri())


class _ArrowFolder:
    """S3, Google Cloud Storage and this machine with pyarrow: credentials and endpoint as the
    stores' own tools have them (AWS_*, instance roles, GOOGLE_APPLICATION_CREDENTIALS)."""

    revision = ""

    def __init__(self, uri: str) -> None:
        from pyarrow import fs

        self._uri = uri
        self._remedy = (
            "give credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "a role)"
            if uri.startswith("s3:")
            else "give credentials in the environment (GOOGLE_APPLICATION_CREDENTIALS, or a role)"
        )
        with _translated(uri, self._remedy):  # it may ask for the bucket's region
            try:
                self._files, self._base = fs.FileSystem.from_uri(_with_limit(uri))
            except ValueError as error:
                raise ConfigError(
                    f"{uri} is no address that pyarrow reads ({error}); give s3://BUCKET/PATH or "
                    "gs://BUCKET/PATH."
                ) from None

    def list_files(self) -> dict[str, RemoteFile]:
        from pyarrow import fs

        with _translated(self._uri, self._remedy):
            selector = fs.FileSelector(self._base, allow_not_found=True)
            entries = self._files.get_file_info(selector)
            if not entries:
                kind = self._files.get_file_info(self._base).type
                if kind is fs.FileType.File:
                    raise ModelError(f"{self._uri} is a file; give the folder that it is in.")
                if kind is fs.FileType.NotFound:
                    raise not_found(self._uri)
        return {
            entry.base_name: RemoteFile(entry.size, f"{entry.size} {entry.mtime_ns}")
            for entry in entries
            if entry.type is fs.FileType.File
        }

    def pieces(self, name: str, file: RemoteFile, start: int) -> Iterator[bytes]:
        uri = f"{self._uri.partition('?')[0].rstrip('/')}/{name}"
        with (
            _translated(uri, self._remedy),
            self._files.open_input_file(f"{self._base}/{name}") as opened,
        ):
            yield from _read_ahead(opened.read_at, start, file.num_bytes or 0)


def _with_limit(uri: str) -> str:
    """For pyarrow, whose calls to Google's stores otherwise try again for 15 minutes; those to S3
    are tried a few times."""
    uri = re.sub("^gcs://", "gs://", uri)
    if not uri.startswith("gs://") or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={GCS_RETRY_S}"


class _FsspecFolder:
    """Everything that fsspec knows and that is installed."""

    revision = ""

    def __init__(self, uri: str) -> None:
        import fsspec.core

        self._uri = uri
        self._remedy = "give credentials in the environment, as the fsspec driver documents"
        try:
            # Instances are kept for the life of the process, and their listings with them.
            self._files, self._base = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        except ImportError as error:
            raise ConfigError(
                f"{uri} needs a driver ({str(error).rstrip('.')}); install it beside Kleash, or "
                f"give {FORMS}."
            ) from None
        except ValueError as error:
            raise ConfigError(
                f"{uri} cannot be used ({str(error).rstrip('.')}); write it as the driver "
                f"documents, or give {FORMS}."
            ) from None

    def list_files(self) -> dict[str, RemoteFile]:
        with _translated(self._uri, self._remedy):
            if self._files.isfile(self._base):
                raise ModelError(f"{self._uri} is a file; give the folder that it is in.")
            entries = self._files.ls(self._base, detail=True)
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: RemoteFile(
                entry.get("size"), _fingerprint(entry)
            )
            for entry in entries
            if entry.get("type") == "file"
        }

    def pieces(self, name: str, file: RemoteFile, start: int) -> Iterator[bytes]:
        path = f"{self._base.rstrip('/')}/{name}"

        def read_at(num_bytes: int, offset: int) -> bytes:
            return self._files.cat_file(path, start=offset, end=offset + num_bytes)

        with _translated(f"{self._uri.rstrip('/')}/{name}", self._remedy):
            size = file.num_bytes if file.num_bytes is not None else self._files.size(path)
            yield from _read_ahead(read_at, start, size or 0)


def _fingerprint(entry: dict[str, Any]) -> str:
    keys = ("size", "etag", "ETag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
    return " ".join(str(entry[key]) for key in keys if key in entry)


def _read_ahead(read_at: Callable[[int, int], bytes], start: int, end: int) -> Iterator[bytes]:
    """The bytes [start, end) in order, with several requests under way."""
    waiting: deque[Future[bytes]] = deque()
    offsets = iter(range(start, end, PIECE_BYTES))
    with ThreadPoolExecutor(PIECES_AHEAD) as threads:
        try:
            while True:
                for offset in offsets:
                    waiting.append(threads.submit(read_at, min(PIECE_BYTES, end - offset), offset))
                    if len(waiting) == PIECES_AHEAD:
                        break
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _translated(uri: str, remedy: str) -> Iterator[None]:
    """What libraries raise, as this package's errors."""
    try:
        yield
    except KleashError:
        raise
    except Exception as error:  # every driver has errors of its own
        text = _REQUEST_ID.sub("", str(error))
        if isinstance(error, FileNotFoundError) or _NOT_FOUND.search(text):
            raise not_found(uri) from None
        if isinstance(error, PermissionError) or _DENIED.search(text):
            raise denied(uri, remedy, text) from None
        raise unavailable(uri, text or type(error).__name__) from None
