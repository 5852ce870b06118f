"""Certificate authorities, certificates and ServiceAccount tokens for tests of authentication."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.services.doubler import free_port

from kleash.rpc import token_review
from kleash.rpc.static_tokens import make_token

LOOPBACK = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
DAY = timedelta(days=1)
TRAINER = "system:serviceaccount:rlhf:trainer"


@dataclass(frozen=True)
class Pair:
    """PEM files of a certificate and its key."""

    cert: Path
    key: Path

    def replace_by(self, other: Pair) -> None:
        """Write the contents of ``other`` into these files: the certificate, then the key."""
        self.cert.write_bytes(other.cert.read_bytes())
        self.key.write_bytes(other.key.read_bytes())

    @property
    def serial(self) -> int:
        return x509.load_pem_x509_certificate(self.cert.read_bytes()).serial_number


class Authority:
    """Signs certificates; everything it makes lies in one folder."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = _named(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        builder = self._builder(self._name, self._key, ends_in=DAY)
        certificate = builder.add_extension(constraints, critical=True).sign(
            self._key, hashes.SHA256()
        )
        self.ca = folder / f"{name}.crt"
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str,
        *alternatives: x509.GeneralName,
        common_name: str = "",
        is_expired: bool = False,
    ) -> Pair:
        """Files NAME.crt and NAME.key."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(
            _named(common_name or name), key, ends_in=-DAY / 24 if is_expired else DAY
        )
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        certificate = builder.sign(self._key, hashes.SHA256())
        pair.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return pair

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ends_in: timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * DAY)
            .not_valid_after(now + ends_in)
        )


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def serial_of(port: int) -> int:
    """Serial number of the certificate that a new connection to a port of loopback gets."""
    pem = ssl.get_server_certificate(("127.0.0.1", port), timeout=10)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


class TokenReviewer:
    """An HTTPS server with the TokenReview API, for tokens that ``token`` has signed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.own_token = "the server's own token"
        self.num_reviews = 0
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.entered = threading.Event()
        self.knows_audiences = True
        self.status = 201
        self.garbles: Callable[[str], str] | None = None
        """Makes something else of an answer."""
        self._secret = b"signs tokens"

    def token(
        self, name: str = "", audience: str = "kleash", *, ends_in_s: float = 600.0, **claims: Any
    ) -> str:
        """A token of ServiceAccount ``name`` ("NAMESPACE:NAME")."""
        claims = {
            "sub": f"system:serviceaccount:{name}",
            "aud": [audience],
            "exp": time.time() + ends_in_s,
            **claims,
        }
        parts = [_encode(json.dumps({"alg": "HS256"})), _encode(json.dumps(claims))]
        return ".".join([*parts, self._sign(parts)])

    def review(self, request: dict[str, Any]) -> dict[str, Any]:
        """The TokenReview with its status."""
        assert (request["apiVersion"], request["kind"]) == (
            "authentication.k8s.io/v1",
            "TokenReview",
        )
        *parts, signature = request["spec"]["token"].split(".")
        status: dict[str, Any] = {"authenticated": False, "error": "invalid bearer token"}
        if signature == self._sign(parts):
            claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=="))
            common = sorted({*claims["aud"]} & {*request["spec"]["audiences"]})
            if claims["exp"] > time.time() and (common or not self.knows_audiences):
                status = {"authenticated": True, "user": {"username": claims["sub"]}}
                if self.knows_audiences:
                    status["audiences"] = common
        return {**request, "status": status}

    def _sign(self, parts: list[str]) -> str:
        digest = hmac.digest(self._secret, ".".join(parts).encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """Answers POSTs."""
        reviewer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                reviewer.entered.set()
                assert reviewer.may_answer.wait(20)
                reviewer.num_reviews += 1
                is_known = self.headers["Authorization"] == f"Bearer {reviewer.own_token}"
                is_path = self.path == "/apis/authentication.k8s.io/v1/tokenreviews"
                code = (reviewer.status if is_path else 404) if is_known else 401
                text = json.dumps(reviewer.review(json.loads(body)) if code == 201 else {})
                if reviewer.garbles:
                    text = reviewer.garbles(text)
                if not text.startswith("{"):
                    self.wfile.write(text.encode())
                    return
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *_: Any) -> None:  # noqa: A002
                """Stay silent."""

        return Handler


@contextmanager
def in_cluster(
    authority: Authority, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TokenReviewer]:
    """A pod beside an API server."""
    reviewer = TokenReviewer(free_port())
    (folder / "token").write_text(reviewer.own_token + "\n")
    (folder / "ca.crt").write_bytes(authority.ca.read_bytes())
    monkeypatch.setattr(token_review, "SERVICE_ACCOUNT", folder)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(reviewer.port))
    with listening(reviewer, authority.issue("api-server", *LOOPBACK)):
        yield reviewer


def keys_by_kind(folder: Path) -> tuple[Path, dict[str, str]]:
    """A file of keys, and tokens by kind."""
    right, first_line = make_token("trainer")
    other, second_line = make_token("guest")
    expired, third_line = make_token("trainer", datetime.now(UTC) - timedelta(hours=1))
    keys = folder / "keys"
    keys.write_text(f"# callers\n{first_line}\n\n{second_line}  # not allowed\n{third_line}\n")
    wrong = make_token("trainer")[0]
    return keys, {
        "right": right,
        "wrong": wrong,
        "absent": "",
        "expired": expired,
        "other": other,
    }


def accounts_by_kind(reviewer: TokenReviewer) -> dict[str, str]:
    """Tokens of ServiceAccounts by kind."""
    right = reviewer.token("rlhf:trainer")
    return {
        "right": right,
        "wrong": right[:-3] + "AAA",
        "absent": "",
        "expired": reviewer.token("rlhf:trainer", ends_in_s=-5),
        "other": reviewer.token("rlhf:guest"),
    }


def pairs_by_kind(authority: Authority, stranger: Authority) -> dict[str, Pair | None]:
    """Certificates of callers by kind."""
    name = x509.DNSName("trainer.rlhf.svc")
    return {
        "right": authority.issue("right", x509.DNSName("second.name"), name),
        "wrong": stranger.issue("wrong", name),
        "absent": None,
        "expired": authority.issue("expired", name, is_expired=True),
        "other": authority.issue("other", x509.DNSName("guest.rlhf.svc")),
    }


def server_settings(authority: Authority, keys: Path) -> dict[str, dict[str, Any]]:
    """Keys of ServerConfig by mode, with and without TLS; the trainer is let in, and no guest."""
    server = authority.issue("server", *LOOPBACK)
    tls = {"cert": server.cert, "key": server.key}
    allowed = {"allowed_callers": ("trainer", f"{TRAINER[:-3]}*", "trainer.rlhf.svc")}
    static = {"mode": "token", "tokens_file": keys, **allowed}
    account = {"mode": "service_account", "audience": "kleash", **allowed}
    return {
        "none": {},
        "tls": {"tls": tls},
        "token": {"auth": static},
        "token with tls": {"tls": tls, "auth": static},
        "service_account": {"auth": account},
        "mtls": {"tls": {**tls, "client_ca": authority.ca}, "auth": {"mode": "mtls", **allowed}},
    }


def _encode(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


@contextmanager
def listening(reviewer: TokenReviewer, pair: Pair) -> Iterator[None]:
    """Serve the reviewer on its port."""

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that has left is no news."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    with Quiet(("127.0.0.1", reviewer.port), reviewer.handler()) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            reviewer.may_answer.set()
            server.shutdown()
            thread.join()
