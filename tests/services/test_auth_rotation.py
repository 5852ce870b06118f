"""Certificates, keys and tokens that change while the processes run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.services.authority import LOOPBACK, Authority, Pair, serial_of
from tests.services.doubler import (
    CALL_S,
    SERVICE,
    WAIT_S,
    Doubler,
    eventually,
    first,
    free_port,
    hold,
    request_of,
    serving,
)

from kleash.client import Credentials, ReferenceClient, Unauthenticated, Unavailable
from kleash.reference.v1 import reference_pb2, reference_pb2_grpc
from kleash.rpc import reloading
from kleash.rpc.auth import caller
from kleash.rpc.channel import connect
from kleash.rpc.rotating_channel import RotatingChannel
from kleash.rpc.static_tokens import make_token

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def _look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at on every use, and not once a second."""
    monkeypatch.setattr(reloading, "CHECK_S", 0.0)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class Named(Doubler):
    """Remembers who called."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    async def LogProbs(
        self, request: reference_pb2.LogProbsRequest, context: Any
    ) -> reference_pb2.LogProbsResponse:
        self.callers.append(caller())
        return await super().LogProbs(request, context)

    async def GetModel(
        self, request: reference_pb2.GetModelRequest, context: Any
    ) -> reference_pb2.GetModelResponse:
        self.callers.append(caller())
        return reference_pb2.GetModelResponse(dtype="float32")


@contextmanager
def calling(address: str, credentials: Credentials) -> Iterator[tuple[Any, grpc.Channel]]:
    channel = connect(address, service=SERVICE, methods_to_retry=(), credentials=credentials)
    with channel:
        yield reference_pb2_grpc.ReferenceServiceStub(channel), channel


def server_pairs(authority: Authority) -> tuple[Pair, Pair]:
    return authority.issue("server", *LOOPBACK), authority.issue("next", *LOOPBACK)


def test_a_new_server_certificate_is_used_in_place(authority: Authority) -> None:
    """A running call goes on, its connection with it; the next connection sees the new one."""
    pair, following = server_pairs(authority)
    old = pair.serial
    service = Doubler()
    tls = {"cert": pair.cert, "key": pair.key}
    with (
        serving(service, tls=tls) as server,
        calling(server.address, Credentials(ca=authority.ca)) as (stub, _),
    ):
        running = hold(service, stub, 1, 2)
        assert serial_of(server.port) == old
        pair.replace_by(following)
        assert serial_of(server.port) == following.serial != old
        with calling(server.address, Credentials(ca=authority.ca)) as (second, _):
            late = second.LogProbs.future(request_of([3]), timeout=WAIT_S)
            service.gate.set()
            assert first(running.result()) == [2, 4]
            assert first(late.result()) == [6]
        assert first(stub.LogProbs(request_of([4]), timeout=CALL_S)) == [8]


def test_a_new_server_certificate_is_seen_within_the_second(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert reloading.CHECK_S == 1.0
    pair, following = server_pairs(authority)
    with serving(tls={"cert": pair.cert, "key": pair.key}) as server:
        assert serial_of(server.port) == pair.serial
        pair.replace_by(following)
        eventually(lambda: serial_of(server.port) == following.serial)


def test_half_written_certificates_keep_the_old(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Each state that a rotation by hand goes through; every one is told once."""
    pair, following = server_pairs(authority)
    old, cert, key = pair.serial, following.cert.read_bytes(), following.key.read_bytes()
    states = [
        (pair.cert, cert[: len(cert) // 2]),
        (pair.cert, b""),
        (pair.cert, cert),  # with the old key
        (pair.key, key[: len(key) // 2]),
        (pair.key, b"not a key"),
    ]
    with serving(tls={"cert": pair.cert, "key": pair.key}) as server:
        for path, text in states:
            path.write_bytes(text)
            assert [serial_of(server.port) for _ in range(3)] == [old] * 3
        pair.cert.unlink()
        assert [serial_of(server.port) for _ in range(2)] == [old] * 2
        told = [r.getMessage() for r in caplog.records if "keeping the old" in r.getMessage()]
        assert len(told) == len(set(told)) >= 3
        assert all(str(pair.cert) in line for line in told)
        assert "KEY_VALUES_MISMATCH" in "".join(told)
        pair.replace_by(following)
        assert serial_of(server.port) == following.serial


def test_a_new_authority_of_clients_is_used_in_place(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("server", *LOOPBACK)
    other = Authority(tmp_path, "other")
    client_ca = tmp_path / "clients.crt"
    client_ca.write_bytes(authority.ca.read_bytes())
    mine = authority.issue("mine", x509.DNSName("mine"))
    theirs = other.issue("theirs", x509.DNSName("theirs"))
    service = Named()
    options: dict[str, Any] = {
        "tls": {"cert": pair.cert, "key": pair.key, "client_ca": client_ca},
        "auth": {"mode": "mtls"},
    }

    def call(its: Pair) -> str:
        credentials = Credentials(ca=authority.ca, cert=its.cert, key=its.key)
        with ReferenceClient(server.address, timeout_s=CALL_S, credentials=credentials) as client:
            client.get_model()
        return service.callers[-1]

    with serving(service, **options) as server:
        assert call(mine) == "mine"
        with pytest.raises(Unavailable, match="both sides use TLS or neither"):
            call(theirs)
        client_ca.write_bytes(other.ca.read_bytes())
        assert call(theirs) == "theirs"
        with pytest.raises(Unavailable):
            call(mine)


def test_a_client_takes_its_new_certificate_at_its_next_call(
    authority: Authority, tmp_path: Path
) -> None:
    """The calls of the old one end well, and then its connection ends, too."""
    pair = authority.issue("server", *LOOPBACK)
    own = authority.issue("own", x509.DNSName("first"))
    following = authority.issue("following", x509.DNSName("second"))
    service = Named()
    tls = {"cert": pair.cert, "key": pair.key, "client_ca": authority.ca}
    credentials = Credentials(ca=authority.ca, cert=own.cert, key=own.key)
    with (
        serving(service, tls=tls, auth={"mode": "mtls"}) as server,
        calling(server.address, credentials) as (stub, channel),
    ):
        assert isinstance(channel, RotatingChannel)
        old = channel._newest
        running = hold(service, stub, 1)
        own.cert.write_bytes(following.cert.read_bytes())  # with the old key: not used yet
        assert stub.GetModel(reference_pb2.GetModelRequest(), timeout=CALL_S).dtype == "float32"
        own.replace_by(following)
        for _ in range(2):
            stub.GetModel(reference_pb2.GetModelRequest(), timeout=CALL_S)
        assert service.callers == ["first", "first", "second", "second"]
        assert not running.done()
        service.gate.set()
        assert first(running.result()) == [2]
        eventually(lambda: old.num_calls == 0)
        stub.GetModel(reference_pb2.GetModelRequest(), timeout=CALL_S)
        with pytest.raises(ValueError, match="closed channel"):
            old.channel.unary_unary("/x/Y")(b"")
        assert channel._retired == []


def test_a_client_follows_the_authority_of_its_server(authority: Authority, tmp_path: Path) -> None:
    """One client object, before and after everything has been signed anew."""
    other = Authority(tmp_path, "other")
    pair = authority.issue("server", *LOOPBACK)
    following = other.issue("following", *LOOPBACK)
    ca = tmp_path / "ca.crt"
    ca.write_bytes(authority.ca.read_bytes())
    port = free_port()
    tls = {"cert": pair.cert, "key": pair.key}
    address, credentials = f"127.0.0.1:{port}", Credentials(ca=ca)
    with ReferenceClient(address, timeout_s=CALL_S, credentials=credentials) as client:
        with serving(Named(), tls=tls, port=port):
            client.get_model()
        pair.replace_by(following)
        with serving(Named(), tls=tls, port=port):
            with pytest.raises(Unavailable) as caught:
                client.get_model()
            assert caught.value.reason == "TLS"
            assert "KLEASH_TLS_CA" in str(caught.value)
            ca.write_bytes(other.ca.read_bytes())
            client.get_model()


def test_keys_of_callers_change_in_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two keys of one name overlap while the caller changes from one to the other."""
    keys, token_file = tmp_path / "keys", tmp_path / "token"
    (old, old_line), (new, new_line) = make_token("trainer"), make_token("trainer")
    keys.write_text(old_line + "\n")
    token_file.write_text(old + "\n")
    auth = {"mode": "token", "tokens_file": keys}
    service, credentials = Named(), Credentials(token_file=token_file)
    with (
        serving(service, auth=auth) as server,
        ReferenceClient(server.address, timeout_s=CALL_S, credentials=credentials) as client,
    ):
        client.get_model()
        keys.write_text(f"{old_line}\n{new_line}\n")
        client.get_model()
        token_file.write_text(new)
        client.get_model()
        keys.write_text(new_line + "\n")
        client.get_model()
        token_file.write_text(old)
        with pytest.raises(Unauthenticated) as caught:
            client.get_model()
        assert caught.value.reason == "BAD_CREDENTIALS"
        token_file.write_text(new)
        for text in (f"{new_line}\ntrainer sha256:12", "", "# none"):
            keys.write_text(text)
            client.get_model()
        keys.unlink()
        client.get_model()
        token_file.unlink()
        client.get_model()
        assert service.callers == ["trainer"] * 9
    told = [r.getMessage() for r in caplog.records if "keeping the old" in r.getMessage()]
    assert any(f"{keys}:2: a line is" in line for line in told)
    assert any(f"cannot read {token_file}" in line for line in told)
    assert not any(secret in line for line in told for secret in (old, new))


class Gates:
    """Channels that a RotatingChannel opens, over a value that tests replace."""

    def __init__(self, address: str) -> None:
        self.pem: Any = object()
        self.opened: list[grpc.Channel] = []
        self._address = address

    def current(self) -> Any:
        return self.pem

    def open(self, _pem: Any) -> grpc.Channel:
        self.opened.append(grpc.insecure_channel(self._address))
        return self.opened[-1]


def is_open(channel: grpc.Channel) -> bool:
    try:
        return channel.unary_unary("/x/Y")(b"", timeout=CALL_S) is not None
    except grpc.RpcError:
        return True
    except ValueError:
        return False


def test_calls_of_every_kind_survive_rotation_in_many_threads() -> None:
    service = Named()
    with serving(service) as server:
        gates = Gates(server.address)
        with RotatingChannel(gates.open, gates, None) as channel:  # type: ignore[arg-type]
            stub = reference_pb2_grpc.ReferenceServiceStub(channel)
            wrong: list[BaseException] = []
            stop = threading.Event()

            def work() -> None:
                try:
                    while not stop.is_set():
                        assert first(stub.LogProbs(request_of([1]), timeout=WAIT_S)) == [2]
                        future = stub.LogProbs.future(request_of([2]), timeout=WAIT_S)
                        answer, call = stub.LogProbs.with_call(request_of([3]), timeout=WAIT_S)
                        assert (first(answer), call.code()) == ([6], grpc.StatusCode.OK)
                        assert first(future.result()) == [4]
                except BaseException as error:
                    wrong.append(error)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for count in range(2, 12):
                gates.pem = object()
                eventually(lambda count=count: len(gates.opened) >= count or wrong)
            stop.set()
            for thread in threads:
                thread.join(WAIT_S)
            assert wrong == []
            # Futures end a moment after their results are there.
            eventually(lambda: not any(its.num_calls for its in channel._retired))
            stub.LogProbs(request_of([1]), timeout=WAIT_S)
            assert [is_open(its) for its in gates.opened] == [False] * (len(gates.opened) - 1) + [
                True
            ]
        assert not any(map(is_open, gates.opened))


def test_a_stream_that_is_left_alone_does_not_keep_the_old_channel() -> None:
    with serving() as server:
        gates = Gates(server.address)
        with RotatingChannel(gates.open, gates, lambda: "a-token") as channel:  # type: ignore[arg-type]
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            gates.pem = object()
            stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
            assert [is_open(its) for its in gates.opened] == [True, True]
            watch.cancel()
            eventually(lambda: not any(its.num_calls for its in channel._retired))
            stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_S)
            assert [is_open(its) for its in gates.opened] == [False, True]
