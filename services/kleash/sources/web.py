"""A folder on a web server: files by the names that checkpoints have, since servers do not list."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from kleash.base.errors import UserError
from kleash.sources.checkpoint import CONFIG, INDEX, LINEAGE, TOKENIZERS, shards_of
from kleash.sources.errors import SourceUnavailable, denied, not_found, unavailable
from kleash.sources.remote import RemoteFile

KNOWN_NAMES = (
    CONFIG, INDEX, LINEAGE, *TOKENIZERS,
    "model.safetensors", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "tokenizer.model", "sentencepiece.bpe.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Asked for one by one; the pickled ones only to say what is wrong with a folder."""

TIMEOUT_S = 60.0
"""Of connecting, and of every wait for more bytes."""
_PIECE_BYTES = 2**20
_REMEDY = "folders of web servers are read without any"
_WORTH_ANOTHER_TRY = (408, 425, 429, 500, 502, 503, 504)


class WebFolder:
    """``https://HOST/PATH/`` with the files of a checkpoint below."""

    revision = ""

    def __init__(self, uri: str) -> None:
        parts = urllib.parse.urlsplit(uri)
        if parts.query or parts.fragment:
            raise UserError(f"{uri} has a '?' or '#'; give the folder's plain address.")
        self._uri = uri.rstrip("/")

    def list_files(self) -> dict[str, RemoteFile]:
        files = self._look_up(KNOWN_NAMES)
        if not files:
            raise not_found(self._uri, f"nothing like {CONFIG} is below it")
        if INDEX in files:
            content = b"".join(self.pieces(INDEX, files[INDEX], 0))
            with contextlib.suppress(ValueError, AttributeError):
                files |= self._look_up(sorted(shards_of(json.loads(content))))
        return files

    def pieces(self, name: str, file: RemoteFile, start: int) -> Iterator[bytes]:
        return stream(self._url(name), start, fingerprint=file.fingerprint)

    def _look_up(self, names: tuple[str, ...] | list[str]) -> dict[str, RemoteFile]:
        with ThreadPoolExecutor(4) as threads:
            found = threads.map(self._describe, names)
            return {name: file for name, file in zip(names, found, strict=True) if file}

    def _describe(self, name: str) -> RemoteFile | None:
        """What the server says of a file; None when it has none of that name."""
        url = self._url(name)
        for method in ("HEAD", "GET"):
            try:
                with _open(url, method) as response:
                    length = response.headers.get("Content-Length")
                    num_bytes = int(length) if length and length.isdigit() else None
                    return RemoteFile(num_bytes, _fingerprint(response))
            except urllib.error.HTTPError as error:
                error.close()
                if method == "HEAD" and error.code in (400, 403, 405, 501):
                    continue  # the server may answer to GET alone
                # Stores that do not let their folders be listed answer 403 for what is not there.
                if error.code in (404, 410) or (error.code == 403 and name != CONFIG):
                    return None
                raise _explained(url, error) from None
            except (OSError, http.client.HTTPException) as error:
                raise _explained(url, error) from None
        return None

    def _url(self, name: str) -> str:
        return f"{self._uri}/{urllib.parse.quote(name)}"


def stream(
    url: str, start: int, *, fingerprint: str = "", token: str = "", remedy: str = _REMEDY
) -> Iterator[bytes]:
    """The bytes from ``start`` to the end as they arrive.

    ``fingerprint`` is what the server said of the file before, ``token`` goes to that server alone
    and not to where it redirects, ``remedy`` is for the sentence when it refuses.
    """
    headers = {"Range": f"bytes={start}-"} if start else {}
    with _translated(url, remedy), _open(url, "GET", headers, token) as response:
        if fingerprint and _fingerprint(response) != fingerprint:
            raise SourceUnavailable(
                f"{url} changed while it was fetched",
                "fetch it again when nobody writes there any more",
            )
        # A server that knows no ranges sends everything again.
        unwanted = start if response.status != http.HTTPStatus.PARTIAL_CONTENT else 0
        while piece := response.read1(_PIECE_BYTES):
            if len(piece) > unwanted:
                yield piece[unwanted:]
            unwanted = max(unwanted - len(piece), 0)


def _open(
    url: str, method: str, headers: dict[str, str] | None = None, token: str = ""
) -> http.client.HTTPResponse:
    # A server that compresses on the way would tell another length than the file's.
    headers = {"Accept-Encoding": "identity", "User-Agent": "kleash", **(headers or {})}
    request = urllib.request.Request(url, headers=headers, method=method)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def _fingerprint(response: http.client.HTTPResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


@contextlib.contextmanager
def _translated(url: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise _explained(url, error, remedy) from None


def _explained(url: str, error: Exception, remedy: str = _REMEDY) -> Exception:
    """What went wrong, as this package's errors."""
    if isinstance(error, urllib.error.HTTPError):
        answer = f"the server answered {error.code} {error.reason}"
        if error.code in (404, 410):
            return not_found(url)
        if error.code in (401, 403, 407):
            return denied(url, remedy, answer)
        if error.code in _WORTH_ANOTHER_TRY:
            return unavailable(url, answer)
        return UserError(
            f"{url} cannot be read: {answer}; give the address of a folder whose files the server "
            "sends to everybody who asks with GET."
        )
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return UserError(
            f"the certificate of {url} is not trusted ({reason.verify_message}); name the "
            "authority's file in SSL_CERT_FILE."
        )
    return unavailable(url, str(reason) or type(reason).__name__)
