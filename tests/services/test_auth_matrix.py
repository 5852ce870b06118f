"""Who gets what: each mode, with right, wrong, absent and expired credentials, on each port."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import REGISTRY
from tests.services.authority import (
    TRAINER,
    Authority,
    accounts_by_kind,
    in_cluster,
    keys_by_kind,
    pairs_by_kind,
    server_settings,
)
from tests.services.doubler import (
    CALL_S,
    SERVICE,
    Doubler,
    first,
    free_port,
    health_of,
    request_of,
    serving,
)

from kleash.reference.v1 import reference_pb2, reference_pb2_grpc
from kleash.rpc.auth import caller
from kleash.rpc.channel import connect
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import from_rpc_error

pytestmark = pytest.mark.services

MODES = ("none", "tls", "token", "token with tls", "service_account", "mtls")


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


@dataclass
class Mode:
    """A server in one mode, and credentials by kind."""

    service: Named
    address: str
    health_port: int
    metrics_port: int
    name: str
    """Of the caller with the right credentials."""
    credentials: dict[str, Credentials] = field(default_factory=dict)

    def call(self, kind: str, method: str = "LogProbs", body: bytes | None = None) -> str:
        """What a call says: "OK", or status and reason."""
        raw = request_of([1, 2]).SerializeToString() if body is None else body
        with self._channel(kind) as channel:
            try:
                answer = channel.unary_unary(f"/{SERVICE}/{method}")(raw, timeout=CALL_S)
            except grpc.RpcError as error:
                return outcome_of(error)
        assert first(reference_pb2.LogProbsResponse.FromString(answer)) == [2, 4]
        return "OK"

    def health(self, kind: str) -> str:
        with self._channel(kind) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=CALL_S)
            except grpc.RpcError as error:
                return outcome_of(error)
        return "OK"

    def reflection(self, kind: str) -> str:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with self._channel(kind) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            try:
                (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=CALL_S)
            except grpc.RpcError as error:
                return outcome_of(error)
        names = {its.name for its in answer.list_services_response.service}
        assert SERVICE in names
        return "OK"

    def _channel(self, kind: str) -> grpc.Channel:
        # No retries and no wait for health, so that the first answer is the one that is seen.
        return connect(
            self.address,
            service=SERVICE,
            methods_to_retry=(),
            checks_health=False,
            credentials=self.credentials[kind],
        )


def outcome_of(error: grpc.RpcError) -> str:
    status: Any = error
    return f"{status.code().name} {from_rpc_error(error).reason}"


@pytest.fixture(scope="module")
def modes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Mode]]:
    folder = tmp_path_factory.mktemp("auth")
    authority, stranger = Authority(folder), Authority(folder, "stranger")
    keys, tokens = keys_by_kind(folder)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        reviewer = stack.enter_context(in_cluster(authority, folder, patch))
        found = {}
        for name, options in server_settings(authority, keys).items():
            service, health, metrics = Named(), free_port(), free_port()
            ports = {"health_port": health, "metrics_port": metrics}
            its = stack.enter_context(serving(service, **ports, **options))
            found[name] = Mode(service, its.address, health, metrics, name="")
        ca = authority.ca
        by_token = {kind: Credentials(token=token) for kind, token in tokens.items()}
        found["none"].credentials = by_token
        found["tls"].credentials = {
            kind: Credentials(token=its.token, ca=ca) for kind, its in by_token.items()
        }
        found["token"].name = found["token with tls"].name = "trainer"
        found["token"].credentials = by_token
        found["token with tls"].credentials = found["tls"].credentials
        found["service_account"].name = TRAINER
        found["service_account"].credentials = {
            kind: Credentials(token=token) for kind, token in accounts_by_kind(reviewer).items()
        }
        found["mtls"].name = "trainer.rlhf.svc"
        found["mtls"].credentials = {
            kind: Credentials(ca=ca, cert=pair.cert, key=pair.key) if pair else Credentials(ca=ca)
            for kind, pair in pairs_by_kind(authority, stranger).items()
        }
        yield found


OK = dict.fromkeys(("right", "wrong", "absent", "expired", "other"), "OK")
BY_TOKEN = {
    "right": "OK",
    "wrong": "UNAUTHENTICATED BAD_CREDENTIALS",
    "absent": "UNAUTHENTICATED MISSING_CREDENTIALS",
    "expired": "UNAUTHENTICATED EXPIRED",
    "other": "PERMISSION_DENIED CALLER_NOT_ALLOWED",
}
# The handshake ends the connection of who has no certificate of the authority.
NO_CONNECTION = dict.fromkeys(("wrong", "absent", "expired"), "UNAVAILABLE UNREACHABLE")
BY_CERTIFICATE = {"right": "OK", "other": "PERMISSION_DENIED CALLER_NOT_ALLOWED", **NO_CONNECTION}
CALLS = {
    "none": OK,
    "tls": OK,
    "token": BY_TOKEN,
    "token with tls": BY_TOKEN,
    "service_account": BY_TOKEN,
    "mtls": BY_CERTIFICATE,
}
HEALTH = {**dict.fromkeys(MODES, OK), "mtls": {**OK, **NO_CONNECTION}}
CELLS = [(mode, kind) for mode in MODES for kind in OK]


@pytest.mark.parametrize(("mode", "kind"), CELLS)
def test_a_call(modes: dict[str, Mode], mode: str, kind: str) -> None:
    its = modes[mode]
    its.service.callers.clear()
    assert its.call(kind) == CALLS[mode][kind]
    assert its.service.callers == ([its.name] if CALLS[mode][kind] == "OK" else [])


@pytest.mark.parametrize(("mode", "kind"), CELLS)
def test_reflection_is_for_callers(modes: dict[str, Mode], mode: str, kind: str) -> None:
    assert modes[mode].reflection(kind) == CALLS[mode][kind]


@pytest.mark.parametrize(("mode", "kind"), CELLS)
def test_health_is_open(modes: dict[str, Mode], mode: str, kind: str) -> None:
    assert modes[mode].health(kind) == HEALTH[mode][kind]


@pytest.mark.parametrize("mode", MODES)
def test_the_other_ports_are_plain_and_open(modes: dict[str, Mode], mode: str) -> None:
    its = modes[mode]
    for name in (SERVICE, "", "liveness"):
        assert health_of(f"127.0.0.1:{its.health_port}", name) == "SERVING"
    url = f"http://127.0.0.1:{its.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=CALL_S) as page:
        assert "kleash_requests_rejected_total" in page.read().decode()


@pytest.mark.parametrize("mode", MODES)
def test_the_health_port_serves_health_alone(modes: dict[str, Mode], mode: str) -> None:
    """It is open to everybody: nothing else may be reached through it."""
    with grpc.insecure_channel(f"127.0.0.1:{modes[mode].health_port}") as channel:
        stub = reference_pb2_grpc.ReferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.LogProbs(request_of([1]), timeout=CALL_S)
    assert outcome_of(caught.value).startswith("UNIMPLEMENTED ")


@pytest.mark.parametrize("mode", [mode for mode in MODES if CALLS[mode] is not OK])
def test_refusals_come_before_the_request_is_parsed(modes: dict[str, Mode], mode: str) -> None:
    """Bytes that are no message: who may not call is not told that, and nothing read them."""
    its = modes[mode]
    labels = {"grpc_service": SERVICE, "grpc_method": "LogProbs"}

    def count(metric: str, **more: str) -> float:
        return REGISTRY.get_sample_value(metric, more) or 0.0

    def rejected() -> float:
        return count("kleash_requests_rejected_total", service="reference", reason="auth")

    read = count("grpc_server_msg_received_bytes_count", **labels)
    before = rejected()
    kinds = [kind for kind, answer in CALLS[mode].items() if answer.startswith(("UNAUTH", "PERM"))]
    for kind in kinds:
        assert its.call(kind, body=b"\xff" * 100) == CALLS[mode][kind]
    assert rejected() - before == len(kinds) > 0
    assert count("grpc_server_msg_received_bytes_count", **labels) == read
    assert its.call("right", body=b"\xff" * 100) == "INVALID_ARGUMENT INVALID_ARGUMENT"
    assert rejected() - before == len(kinds)


@pytest.mark.parametrize("mode", ["token", "service_account"])
def test_a_method_that_does_not_exist_is_not_told_to_strangers(
    modes: dict[str, Mode], mode: str
) -> None:
    its = modes[mode]
    assert its.call("absent", "NoSuch") == "UNAUTHENTICATED MISSING_CREDENTIALS"
    assert its.call("right", "NoSuch").startswith("UNIMPLEMENTED")


def test_refused_calls_are_in_the_metrics_of_calls(modes: dict[str, Mode]) -> None:
    labels = {
        "grpc_type": "unary",
        "grpc_service": SERVICE,
        "grpc_method": "LogProbs",
        "grpc_code": "UNAUTHENTICATED",
    }
    before = REGISTRY.get_sample_value("grpc_server_handled_total", labels) or 0.0
    modes["token"].call("wrong")
    assert REGISTRY.get_sample_value("grpc_server_handled_total", labels) == before + 1


def test_every_call_is_in_the_audit_log(
    modes: dict[str, Mode], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="kleash.audit")
    for kind in ("right", "wrong", "other"):
        modes["token"].call(kind)
    modes["mtls"].call("other")
    modes["none"].call("right")
    lines = [record.getMessage() for record in caplog.records if record.name == "kleash.audit"]
    method = f"method={SERVICE}/LogProbs"
    assert [line.split(" peer=")[0] for line in lines] == [
        "caller=trainer",
        "caller=-",
        "caller=guest",
        "caller=guest.rlhf.svc",
    ]
    assert all(" peer=ipv4:127.0.0.1:" in line and method in line for line in lines)
    assert "status=OK reason=- model=- " in lines[0]
    assert "status=UNAUTHENTICATED reason=BAD_CREDENTIALS" in lines[1]
    assert "status=PERMISSION_DENIED reason=CALLER_NOT_ALLOWED" in lines[3]
    secret = modes["token"].credentials["wrong"].token
    assert not any(secret in line for line in lines)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ([("authorization", "Basic dHJhaW5lcjpw")], "BAD_CREDENTIALS"),
        ([("authorization", "Bearer")], "BAD_CREDENTIALS"),
        ([("authorization", "{right}")], "BAD_CREDENTIALS"),
        ([("authorization", "Bearer {right}"), ("authorization", "Bearer x")], "BAD_CREDENTIALS"),
        ([("authorization", "bearer {right}")], ""),
    ],
)
def test_the_shape_of_the_metadata(
    modes: dict[str, Mode], metadata: list[tuple[str, str]], reason: str
) -> None:
    token = modes["token"].credentials["right"].token
    sent = [(key, value.replace("{right}", token)) for key, value in metadata]
    with grpc.insecure_channel(modes["token"].address) as channel:
        call = reference_pb2_grpc.ReferenceServiceStub(channel).LogProbs
        if not reason:
            assert first(call(request_of([1, 2]), metadata=sent, timeout=CALL_S)) == [2, 4]
            return
        with pytest.raises(grpc.RpcError) as caught:
            call(request_of([1, 2]), metadata=sent, timeout=CALL_S)
    assert outcome_of(caught.value) == f"UNAUTHENTICATED {reason}"
