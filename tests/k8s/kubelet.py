"""A stand-in for the kubelet of a test cluster: serves logs of containers to the API server, which
hands them on to clients. The rest of the way is the real one."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.k8s.api_server import ApiServer

NODE = "test-node"


class Kubelet:
    """Use it as a context manager; ``log`` adds lines, which followers get at once."""

    def __init__(self, api_server: ApiServer, folder: Path) -> None:
        self._api_server = api_server
        self._logs: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
        """Nanoseconds since 1970 and the line."""
        self._closed: set[tuple[str, str, str]] = set()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._num_cuts = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(_certificate(folder / "kubelet.pem"))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        name = {"metadata": {"name": NODE}}
        node = self._api_server.request("POST", "/api/v1/nodes", {"kind": "Node", **name})
        node["status"] = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_port}},
        }
        self._api_server.request("PUT", f"/api/v1/nodes/{NODE}/status", node)
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._api_server.request("DELETE", f"/api/v1/nodes/{NODE}")

    def log(self, namespace: str, pod: str, container: str, *lines: str) -> None:
        """Add lines to a container's log."""
        with self._changed:
            log = self._logs.setdefault((namespace, pod, container), [])
            for line in lines:
                newest = log[-1][0] if log else 0
                log.append((max(time.time_ns(), newest + 1), line))
            self._changed.notify_all()

    def cut(self) -> None:
        """Break off every log that is being read, as a restart of the API server does."""
        with self._changed:
            self._num_cuts += 1
            self._changed.notify_all()

    def end_log(self, namespace: str, pod: str, container: str) -> None:
        """The container has ended: followers come to the end."""
        with self._changed:
            self._closed.add((namespace, pod, container))
            self._changed.notify_all()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        kubelet = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                query = parse_qs(url.query)
                _, kind, *key = url.path.split("/")
                if kind != "containerLogs" or len(key) != 3:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/plain")
                self.end_headers()
                self.close_connection = True
                kubelet._send(
                    self,
                    (key[0], key[1], key[2]),
                    tail=int(query["tailLines"][0]) if "tailLines" in query else None,
                    since_s=float(query["sinceSeconds"][0]) if "sinceSeconds" in query else None,
                    follow=query.get("follow") == ["true"],
                    has_times=query.get("timestamps") == ["true"],
                )

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Silence."""

        return Handler

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        key: tuple[str, str, str],
        *,
        tail: int | None,
        since_s: float | None,
        follow: bool,
        has_times: bool,
    ) -> None:
        with self._changed:
            lines = list(self._logs.get(key, ()))
            num_cuts = self._num_cuts
        position = max(len(lines) - tail, 0) if tail is not None else 0
        if since_s is not None:
            first = time.time_ns() - since_s * 1e9
            position = sum(written < first for written, _ in lines)
        end = time.monotonic() + 60
        while True:
            try:
                for written, line in lines[position:]:
                    time_text = f"{_rfc3339(written)} " if has_times else ""
                    handler.wfile.write(f"{time_text}{line}\n".encode())
                handler.wfile.flush()
            except OSError:  # the client has left
                return
            position = len(lines)
            with self._changed:
                is_over = key in self._closed or self._is_stopping or time.monotonic() > end
                if num_cuts != self._num_cuts:
                    return
                if not follow or (is_over and position == len(self._logs.get(key, ()))):
                    return
                if position == len(self._logs.get(key, ())):
                    self._changed.wait(0.5)
                lines = list(self._logs.get(key, ()))


def _rfc3339(written: int) -> str:
    """Nanoseconds since 1970 as a kubelet writes them."""
    seconds, nanoseconds = divmod(written, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09d}Z"


def _certificate(path: Path) -> Path:
    """A key and a certificate of its own in one PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubelet")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path
