"""How long the HTTP port waits for whom: silent callers, slow readers, those who leave."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from prometheus_client import REGISTRY
from tests.services.doubler import WAIT_S, eventually, free_port
from tests.services.http_client import JSON, LINES, HttpPort, serving_http

from kleash.common.v1 import common_pb2
from kleash.reward.http import API, SERVICE
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc import http_calls
from kleash.rpc.codec import encode_floats
from kleash.rpc.http_connection import Connection
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

NUM_FLOATS = 4_000_000
"""Of an answer that no socket buffers."""
ITEMS = {"items": [{"text": "a"}]}


class Flood(reward_pb2_grpc.RewardServiceServicer):
    """Large answers; a stream does what ``on_item`` says."""

    full_names = (SERVICE,)
    http_api = API

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.was_cancelled = threading.Event()
        self.on_item = "flood"

    def load(self) -> None:
        values = encode_floats(np.ones(NUM_FLOATS, dtype=np.float32))
        self.result = reward_pb2.ScoreResult(
            code=common_pb2.ITEM_STATUS_CODE_OK, token_scores=values
        )

    def register(self, server: Any) -> None:
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self, server)

    async def start(self) -> None: ...

    def is_ready(self, full_name: str) -> bool:
        return True

    def heartbeat_age_s(self) -> float:
        return 0.0

    async def stop(self) -> None: ...

    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        self.answered.set()
        return reward_pb2.ScoreResponse(results=[self.result])

    async def ScoreStream(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for _ in request_iterator:
                if self.on_item == "leave":
                    context.transport().close()
                    yield reward_pb2.ScoreStreamResponse()
                while self.on_item == "flood":
                    yield reward_pb2.ScoreStreamResponse(result=self.result)
                    self.answered.set()
                self.answered.set()
        finally:
            self.was_cancelled.set()


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a server's side of a connection has ended."""
    event, before = threading.Event(), Connection.connection_lost

    def connection_lost(self: Connection, exc: BaseException | None) -> None:
        before(self, exc)
        event.set()

    monkeypatch.setattr(Connection, "connection_lost", connection_lost)
    return event


@contextlib.contextmanager
def sent(port: HttpPort, path: str, body: Any, headers: dict[str, str]) -> Iterator[Any]:
    """A connection over which a request has been sent, and nothing is read."""
    connection = port.connection()
    connection.connect()
    assert connection.sock is not None
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    connection.request("POST", path, json.dumps(body).encode() + b"\n", headers)
    try:
        yield connection
    finally:
        connection.close()


@pytest.mark.parametrize("head", [b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow"])
def test_a_caller_that_says_nothing_is_not_kept(head: bytes) -> None:
    with serving_http(Flood(), max_connection_age_s=0.3) as (_, port):
        with socket.create_connection(("127.0.0.1", port.port), timeout=WAIT_S) as caller:
            caller.sendall(head)
            assert caller.recv(1) == b""
        assert port.get("/healthz").status == 200


def test_a_reader_that_takes_no_answer_is_cut_off(lost: threading.Event) -> None:
    service = Flood()
    with (
        serving_http(service, max_request_s=1.0) as (_, port),
        sent(port, "/v1/score", ITEMS, JSON) as connection,
    ):
        assert service.answered.wait(WAIT_S)
        assert lost.wait(WAIT_S)
        response = connection.getresponse()
        with contextlib.suppress(OSError):  # what the sockets hold, and no more
            assert len(response.read(4 * NUM_FLOATS)) < 4 * NUM_FLOATS


def test_a_reader_that_takes_no_lines_is_cut_off(
    lost: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_calls, "SLOW_READER_S", 0.3)
    service = Flood()
    with (
        serving_http(service, max_request_s=1.0) as (_, port),
        sent(port, "/v1/score_stream", {"item": {}}, LINES),
    ):
        assert service.was_cancelled.wait(WAIT_S)
        assert lost.wait(WAIT_S)


def test_a_stream_ends_when_its_caller_leaves() -> None:
    service = Flood()
    service.on_item = "wait"
    headers = {**LINES, "Content-Length": "1000"}
    with (
        serving_http(service) as (_, port),
        sent(port, "/v1/score_stream", {"item": {}}, headers) as connection,
    ):
        assert service.answered.wait(WAIT_S)
        assert not service.was_cancelled.is_set()
        connection.close()
        assert service.was_cancelled.wait(WAIT_S)


def test_a_reader_that_leaves_is_no_fault_of_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    labels = {
        "grpc_type": "bidi_stream",
        "grpc_service": SERVICE,
        "grpc_method": "ScoreStream",
        "grpc_code": "CANCELLED",
    }

    def transport(self: http_calls.HttpContext) -> Any:
        return self._request.transport

    monkeypatch.setattr(http_calls.HttpContext, "transport", transport, raising=False)

    def cancelled() -> float:
        return REGISTRY.get_sample_value("grpc_server_handled_total", labels) or 0.0

    before, service = cancelled(), Flood()
    service.on_item = "leave"
    with (
        serving_http(service) as (_, port),
        sent(port, "/v1/score_stream", {"item": {}}, LINES),
    ):
        assert service.was_cancelled.wait(WAIT_S)
        eventually(lambda: cancelled() == before + 1)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_server_that_ends_waits_for_the_readers_of_its_answers() -> None:
    service, number = Flood(), free_port()
    server = BackgroundServer([service], ServerConfig(http_port=number))
    server.__enter__()
    ending = threading.Thread(target=server.__exit__)
    with sent(HttpPort(number), "/v1/score", ITEMS, JSON) as connection:
        assert service.answered.wait(WAIT_S)
        ending.start()
        ending.join(2.0)
        assert ending.is_alive()
        response = connection.getresponse()
        results = json.loads(response.read())["results"]
        ending.join(WAIT_S)
        assert not ending.is_alive()
    assert response.status == 200
    assert results[0]["token_scores"]["count"] == NUM_FLOATS


def test_a_caller_that_leaves_before_it_is_asked_for_the_body_is_no_fault_of_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check = http_calls._check_type

    def leave(request: Any, *, is_stream: bool) -> None:
        check(request, is_stream=is_stream)
        request.transport.close()

    monkeypatch.setattr(http_calls, "_check_type", leave)
    labels = {"grpc_service": SERVICE, "grpc_method": "Score", "grpc_type": "unary"}
    labels["grpc_code"] = "CANCELLED"

    def cancelled() -> float:
        return REGISTRY.get_sample_value("grpc_server_handled_total", labels) or 0.0

    before = cancelled()
    with (
        serving_http(Flood()) as (_, port),
        sent(port, "/v1/score", ITEMS, {**JSON, "Expect": "100-continue"}),
    ):
        eventually(lambda: cancelled() == before + 1)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    ("version", "status", "told"), [(b"1.1", 404, b"close"), (b"1.0", 200, b"")]
)
def test_who_asks_before_it_sends_the_body(version: bytes, status: int, told: bytes) -> None:
    """An old client does not know the question; one that was refused may send the next request."""
    path = b"/v1/score" if status == 200 else b"/nothing"
    body = json.dumps(ITEMS).encode()
    head = (
        b"POST %s HTTP/%s\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (path, version, len(body))
    )
    with (
        serving_http(Flood()) as (_, port),
        socket.create_connection(("127.0.0.1", port.port), timeout=WAIT_S) as caller,
    ):
        caller.sendall(head + (body if status == 200 else b""))
        answer = caller.recv(2000)
    assert answer.startswith(b"HTTP/%s %d " % (version, status))
    assert (b"Connection: close" in answer) == bool(told)
