"""Servers that models are fetched from: a web server with faults, and the Hub's API for one model.

Both are real HTTP servers on loopback; what they were asked for is in ``requests``.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    start: int
    """First byte that was asked for."""
    token: str


@dataclass
class Faults:
    """What a server does wrong, by the name of the file."""

    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """Close the connection after so many bytes, once for each number."""
    missing_bytes: dict[str, int] = field(default_factory=dict)
    """Send so many bytes fewer than announced, and no more, always."""
    status: dict[str, list[int]] = field(default_factory=dict)
    """Answer with each status once."""
    stall_after: dict[str, int] = field(default_factory=dict)
    """Send so many bytes and then nothing, until ``resume`` is set."""
    resume: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)


class FileServer:
    """A folder below ``address``."""

    def __init__(
        self,
        folder: Path,
        *,
        knows_ranges: bool = True,
        tells_length: bool = True,
        forbids_head: bool = False,
        unknown_status: int = 404,
    ) -> None:
        self.folder = folder
        self.knows_ranges, self.tells_length = knows_ranges, tells_length
        self.forbids_head, self.unknown_status = forbids_head, unknown_status
        self.faults = Faults()
        self.requests: list[Asked] = []

    def __enter__(self) -> Any:
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.resume.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def starts_of(self, name: str) -> list[int]:
        """First bytes of the GET requests for a file."""
        return [
            asked.start
            for asked in self.requests
            if asked.method == "GET" and asked.path.endswith(f"/{name}")
        ]

    def answer(self, handler: _Handler, path: str) -> None:
        """A file, by the last part of the path."""
        self.send_file(handler, path.rpartition("/")[2], {})

    def send_file(self, handler: _Handler, name: str, headers: dict[str, str]) -> None:
        path = self.folder / name
        statuses = self.faults.status.get(name)
        if statuses:
            handler.send_answer(statuses.pop(0), b"on purpose")
            return
        if handler.command == "HEAD" and self.forbids_head:
            handler.send_answer(405, b"")
            return
        if not path.is_file():
            handler.send_answer(self.unknown_status, b"no such file")
            return
        content = path.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        handler.send_content(name, content, {"ETag": etag, **headers})


class _Handler(http.server.BaseHTTPRequestHandler):
    server_of: FileServer

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server_of.requests.append(Asked(self.command, path, self._start(), token))
        self.server_of.answer(self, path)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Tests print nothing."""

    def send_answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        server, start = self.server_of, self._start()
        if start and server.knows_ranges:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            content = content[start:]
        else:
            self.send_response(200)
        if server.tells_length:
            self.send_header("Content-Length", str(len(content)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(name, content)

    def _send_body(self, name: str, content: bytes) -> None:
        faults = self.server_of.faults
        end = len(content) - faults.missing_bytes.get(name, 0)
        if cuts := faults.cut_after.get(name):
            end = cuts.pop(0)
        stall = faults.stall_after.get(name)
        self.wfile.write(content[: end if stall is None else stall])
        if stall is not None:
            faults.stalled.set()
            faults.resume.wait(60)
        if end < len(content):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _start(self) -> int:
        found = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", ""))
        return int(found[1]) if found else 0


class Hub(FileServer):
    """The parts of the Hub's API that a download needs: one model at one commit.

    ``*.safetensors`` are large-file objects, whose hash the Hub tells.
    """

    def __init__(self, folder: Path, *, token: str = "", is_gated: bool = False) -> None:
        super().__init__(folder)
        self.token, self.is_gated = token, is_gated
        self.told_sha256: dict[str, str] = {}
        """In place of the true hash of a file."""
        self.large_files_at = ""
        """Address of the server that large files are redirected to; empty for none."""
        self.revisions = {"main": COMMIT, "refs/pr/1": COMMIT, COMMIT: COMMIT}

    def answer(self, handler: _Handler, path: str) -> None:
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.token and token != self.token and not (self.is_gated and path.startswith("/api/")):
            self._refuse(handler)
            return
        routes: tuple[tuple[str, Callable[..., None]], ...] = (
            (r"/api/models/org/model/revision/(.+)", self._model_info),
            (r"/org/model/resolve/([^/]+)/(.+)", self._resolve),
        )
        for pattern, route in routes:
            if found := re.fullmatch(pattern, path):
                if found[1] not in self.revisions:
                    handler.send_answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                else:
                    route(handler, *found.groups())
                return
        handler.send_answer(401, b"", {"X-Error-Code": "RepoNotFound"})

    def _refuse(self, handler: _Handler) -> None:
        """As the Hub does: what a caller may not see does not exist, and what is gated does."""
        if self.is_gated:
            handler.send_answer(
                403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}
            )
        else:
            handler.send_answer(401, b"", {"X-Error-Code": "RepoNotFound"})

    def _model_info(self, handler: _Handler, revision: str) -> None:
        siblings = []
        for path in sorted(self.folder.iterdir()):
            entry = self._entry(path)
            siblings.append(
                {"rfilename": path.name, "size": entry["size"], "blobId": entry["oid"]}
                | ({"lfs": self._lfs(entry)} if "lfs" in entry else {})
            )
        info = {
            "id": "org/model", "modelId": "org/model", "sha": self.revisions[revision],
            "private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings,
        }  # fmt: skip
        self._send_json(handler, info)

    def _lfs(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 130}

    def _entry(self, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
        entry = {"type": "file", "path": path.name, "size": len(content), "oid": blob}
        if path.suffix == ".safetensors":
            sha256 = self.told_sha256.get(path.name) or hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return entry

    def _resolve(self, handler: _Handler, _revision: str, name: str) -> None:
        headers = {"X-Repo-Commit": COMMIT}
        if self.large_files_at and name.endswith(".safetensors"):
            handler.send_answer(302, b"", {"Location": f"{self.large_files_at}/{name}"})
            return
        if (self.folder / name).is_file():
            entry = self._entry(self.folder / name)
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            headers |= {"ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"'}
            headers["X-Linked-Size"] = str(entry["size"])
        self.send_file(handler, name, headers)

    def _send_json(self, handler: _Handler, content: Any) -> None:
        body = json.dumps(content).encode()
        handler.send_answer(200, body, {"Content-Type": "application/json"})
