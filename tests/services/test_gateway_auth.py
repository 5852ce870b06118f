"""Who gets what on the HTTP port: each mode, with right, wrong, absent and expired credentials."""

from __future__ import annotations

import http.client
import ipaddress
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from prometheus_client import REGISTRY
from tests.services.authority import (
    LOOPBACK,
    TRAINER,
    Authority,
    Pair,
    accounts_by_kind,
    in_cluster,
    keys_by_kind,
    pairs_by_kind,
    serial_of,
    server_settings,
)
from tests.services.doubler import SERVICE, WAIT_S, eventually, request_of
from tests.services.http_client import JSON, HttpPort, Reply, ask, serving_http
from tests.services.test_gateway_refusals import CALL, HttpDoubler

from kleash.reference.v1 import reference_pb2_grpc
from kleash.rpc import reloading
from kleash.rpc.auth import caller
from kleash.rpc.channel import connect
from kleash.rpc.credentials import Credentials

pytestmark = pytest.mark.services

KINDS = ("right", "wrong", "absent", "expired", "other")
MODES = ("none", "tls", "token", "token with tls", "service_account", "mtls")


class Named(HttpDoubler):
    """Remembers who called."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    async def LogProbs(self, request: Any, context: Any) -> Any:
        self.callers.append(caller())
        return await super().LogProbs(request, context)


@dataclass
class Mode:
    """A server in one mode, and credentials by kind."""

    service: Named
    number: int
    address: str
    name: str
    """Of the caller with the right credentials."""
    tokens: dict[str, str] = field(default_factory=dict)
    contexts: dict[str, ssl.SSLContext] = field(default_factory=dict)

    def port(self, kind: str) -> HttpPort:
        return HttpPort(self.number, self.contexts.get(kind))

    def headers(self, kind: str) -> dict[str, str]:
        token = self.tokens.get(kind)
        return {**JSON, **({"Authorization": f"Bearer {token}"} if token else {})}

    def ask(self, kind: str, path: str = "/double", body: Any = CALL) -> Reply | None:
        """None for a connection that the server refuses."""
        verb = "POST" if path == "/double" else "GET"
        try:
            return self.port(kind).ask(
                verb, path, body if verb == "POST" else None, self.headers(kind)
            )
        except (ssl.SSLError, ConnectionError, http.client.HTTPException):
            return None

    def outcome(self, kind: str, path: str = "/double", body: Any = CALL) -> str:
        reply = self.ask(kind, path, body)
        if reply is None:
            return "no connection"
        return "OK" if reply.status == 200 else f"{reply.status} {reply.error['reason']}"


@pytest.fixture(scope="module")
def modes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Mode]]:
    folder = tmp_path_factory.mktemp("http-auth")
    authority, stranger = Authority(folder), Authority(folder, "stranger")
    keys, tokens = keys_by_kind(folder)
    plain = {kind: _context(authority.ca) for kind in KINDS}
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        reviewer = stack.enter_context(in_cluster(authority, folder, patch))
        found = {}
        for name, options in server_settings(authority, keys).items():
            service = Named()
            its, port = stack.enter_context(serving_http(service, **options))
            found[name] = Mode(service, port.port, its.address, name="")
        for name in ("token", "token with tls"):
            found[name].name, found[name].tokens = "trainer", tokens
        found["tls"].contexts = found["token with tls"].contexts = plain
        found["service_account"].name = TRAINER
        found["service_account"].tokens = accounts_by_kind(reviewer)
        found["mtls"].name = "trainer.rlhf.svc"
        found["mtls"].contexts = {
            kind: _context(authority.ca, pair)
            for kind, pair in pairs_by_kind(authority, stranger).items()
        }
        yield found


def _context(ca: Path, pair: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    return context


OK = dict.fromkeys(KINDS, "OK")
BY_TOKEN = {
    "right": "OK",
    "wrong": "401 BAD_CREDENTIALS",
    "absent": "401 MISSING_CREDENTIALS",
    "expired": "401 EXPIRED",
    "other": "403 CALLER_NOT_ALLOWED",
}
NO_CONNECTION = dict.fromkeys(("wrong", "absent", "expired"), "no connection")
BY_CERTIFICATE = {"right": "OK", "other": "403 CALLER_NOT_ALLOWED", **NO_CONNECTION}
CALLS = {
    "none": OK,
    "tls": OK,
    "token": BY_TOKEN,
    "token with tls": BY_TOKEN,
    "service_account": BY_TOKEN,
    "mtls": BY_CERTIFICATE,
}
OPEN = {**dict.fromkeys(MODES, OK), "mtls": {**OK, **NO_CONNECTION}}
CELLS = [(mode, kind) for mode in MODES for kind in KINDS]


@pytest.mark.parametrize(("mode", "kind"), CELLS)
def test_a_call(modes: dict[str, Mode], mode: str, kind: str) -> None:
    its = modes[mode]
    its.service.callers.clear()
    assert its.outcome(kind) == CALLS[mode][kind]
    assert its.service.callers == ([its.name] if CALLS[mode][kind] == "OK" else [])


@pytest.mark.parametrize(("mode", "kind"), CELLS)
@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json", "/docs"])
def test_probes_and_pages_are_open(modes: dict[str, Mode], mode: str, kind: str, path: str) -> None:
    assert modes[mode].outcome(kind, path) == OPEN[mode][kind]


@pytest.mark.parametrize(
    ("mode", "security"),
    [("none", []), ("token", [{"bearer": []}]), ("mtls", [{"certificate": []}])],
)
def test_the_document_says_how_callers_are_known(
    modes: dict[str, Mode], mode: str, security: list[Any]
) -> None:
    reply = modes[mode].ask("right", "/openapi.json")
    assert reply is not None
    assert reply.json["paths"]["/v1/score"]["post"]["security"] == security


@pytest.mark.parametrize("mode", [mode for mode in MODES if CALLS[mode] is not OK])
def test_refusals_come_before_the_body_is_parsed(modes: dict[str, Mode], mode: str) -> None:
    its = modes[mode]
    labels = {"service": "reference", "reason": "auth"}

    def rejected() -> float:
        return REGISTRY.get_sample_value("kleash_requests_rejected_total", labels) or 0.0

    before = rejected()
    kinds = [kind for kind, answer in CALLS[mode].items() if answer.startswith("40")]
    for kind in kinds:
        assert its.outcome(kind, body=b"\xff") == CALLS[mode][kind]
    assert rejected() - before == len(kinds) > 0
    assert its.outcome("right", body=b"\xff") == "400 BAD_JSON"


def test_who_may_not_call_is_told_before_it_sends_the_body(modes: dict[str, Mode]) -> None:
    connection = modes["token"].port("absent").connection()
    connection.putrequest("POST", "/double")
    for name, value in {**JSON, "Content-Length": "1000000", "Expect": "100-continue"}.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 401
    assert response.headers["Connection"] == "close"  # nor does it send the body now
    connection.close()


def test_a_body_may_wait_to_be_asked_for(modes: dict[str, Mode]) -> None:
    headers = {**modes["token"].headers("right"), "Expect": "100-continue"}
    reply = modes["token"].port("right").ask("POST", "/double", CALL, headers)
    assert reply.status == 200


def test_a_name_does_not_outlive_its_call_on_a_connection(
    modes: dict[str, Mode], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="kleash.audit")
    its = modes["token"]
    connection = its.port("right").connection()
    assert ask(connection, "POST", "/double", CALL, its.headers("right")).status == 200
    assert ask(connection, "POST", "/double", CALL, its.headers("wrong")).status == 401
    connection.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "kleash.audit"]
    assert [line.split(" peer=")[0] for line in lines] == ["caller=trainer", "caller=-"]
    assert all(" peer=http:127.0.0.1:" in line for line in lines)
    assert all(f"method={SERVICE}/LogProbs" in line for line in lines)
    assert not any(its.tokens["wrong"] in line for line in lines)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["Basic dHJhaW5lcjpw"], "BAD_CREDENTIALS"),
        (["Bearer"], "BAD_CREDENTIALS"),
        (["{right}"], "BAD_CREDENTIALS"),
        (["Bearer {right}", "Bearer x"], "BAD_CREDENTIALS"),
        (["Bearer \xff"], "BAD_CREDENTIALS"),
        (["bearer {right}"], ""),
    ],
)
def test_the_shape_of_the_header(modes: dict[str, Mode], values: list[str], reason: str) -> None:
    its = modes["token"]
    connection = its.port("right").connection()
    connection.putrequest("POST", "/double")
    raw = b'{"items": [{"tokens": {"tokens": {"ids_i32": "AQAAAA==", "count": 1}}}]}'
    for name, value in {**JSON, "Content-Length": str(len(raw))}.items():
        connection.putheader(name, value)
    for value in values:
        connection.putheader("Authorization", value.replace("{right}", its.tokens["right"]))
    connection.endheaders(raw)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == (401 if reason else 200)
    assert reason.encode() in body


def test_a_quota_counts_calls_of_both_ports() -> None:
    service = HttpDoubler()
    quotas = ({"callers": ("busy",), "max_running_calls": 1},)
    with serving_http(service, quotas=quotas) as (server, port):
        service.gate.clear()
        with grpc.insecure_channel(
            server.address, options=[("grpc.primary_user_agent", "busy/1")]
        ) as channel:
            held = reference_pb2_grpc.ReferenceServiceStub(channel).LogProbs.future(
                request_of([1]), timeout=WAIT_S
            )
            assert service.entered.wait(WAIT_S)
            reply = port.post("/double", CALL, {"User-Agent": "busy/2"})
            service.gate.set()
            held.result()
        assert (reply.status, reply.error["reason"]) == (429, "QUOTA")
        assert reply.headers["retry-after"] == "1"
        assert port.post("/double", CALL, {"User-Agent": "busy/2"}).status == 200


NAMES: list[tuple[list[x509.GeneralName], str]] = [
    ([x509.DNSName("a.b"), x509.UniformResourceIdentifier("spiffe://x/y")], "a.b"),
    ([x509.UniformResourceIdentifier("spiffe://x/y"), x509.DNSName("a.b")], "spiffe://x/y"),
    ([x509.RFC822Name("me@a.b")], "me@a.b"),
    ([x509.IPAddress(ipaddress.ip_address("10.1.2.3"))], "10.1.2.3"),
    ([x509.IPAddress(ipaddress.ip_address("fd00::1"))], "fd00::1"),
    ([], "common"),
]


@pytest.mark.parametrize(("alternatives", "name"), NAMES)
def test_a_certificate_names_its_caller_alike_on_both_ports(
    tmp_path: Path, alternatives: list[x509.GeneralName], name: str
) -> None:
    authority = Authority(tmp_path)
    server = authority.issue("server", *LOOPBACK)
    pair = authority.issue("caller", *alternatives, common_name="common")
    tls = {"cert": server.cert, "key": server.key, "client_ca": authority.ca}
    service = Named()
    with serving_http(service, tls=tls, auth={"mode": "mtls"}) as (its, port):
        context = _context(authority.ca, pair)
        assert HttpPort(port.port, context).post("/double", CALL).status == 200
        credentials = Credentials(ca=authority.ca, cert=pair.cert, key=pair.key)
        with connect(
            its.address, service=SERVICE, methods_to_retry=(), credentials=credentials
        ) as channel:
            reference_pb2_grpc.ReferenceServiceStub(channel).LogProbs(request_of([1]), timeout=9)
    assert service.callers == [name, name]


def test_certificates_and_authorities_are_replaced_while_the_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "CHECK_S", 0.0)
    authority, next_one = Authority(tmp_path), Authority(tmp_path, "next")
    server = authority.issue("server", *LOOPBACK)
    old, new = authority.issue("old", *LOOPBACK), next_one.issue("new", *LOOPBACK)
    tls = {"cert": server.cert, "key": server.key, "client_ca": tmp_path / "callers.crt"}
    (tmp_path / "callers.crt").write_bytes(authority.ca.read_bytes())
    with serving_http(Named(), tls=tls, auth={"mode": "mtls"}) as (_, port):

        def answers(pair: Pair) -> bool:
            try:
                its = HttpPort(port.port, _context(authority.ca, pair))
                return its.post("/double", CALL).status == 200
            except (ssl.SSLError, ConnectionError, http.client.HTTPException):
                return False

        assert (answers(old), answers(new)) == (True, False)
        renewed = authority.issue("renewed", *LOOPBACK)
        before = serial_of(port.port)
        server.cert.write_bytes(renewed.cert.read_bytes())
        assert serial_of(port.port) == before  # half-written: the old pair stays in use
        assert answers(old)
        server.key.write_bytes(renewed.key.read_bytes())
        eventually(lambda: serial_of(port.port) == renewed.serial)
        (tmp_path / "callers.crt").write_bytes(next_one.ca.read_bytes())
        eventually(lambda: answers(new))
        assert not answers(old)
