"""What the HTTP port refuses, and how it says so; limits, deadlines, the end of a server."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.services.doubler import (
    SERVICE,
    WAIT_S,
    Doubler,
    eventually,
    first,
    free_port,
    request_of,
)
from tests.services.http_client import (
    JSON,
    LINES,
    HttpPort,
    Reply,
    ask,
    serving_http,
    serving_reward,
)

from kleash.rpc import errors
from kleash.rpc.http_answer import status_of
from kleash.rpc.http_api import HttpApi, HttpRoute
from kleash.rpc.requests import Limits
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

MAX_BYTES = 60_000
LIMITS = Limits(max_items=4, max_batch_tokens=512, max_queued_tokens=512, max_message_bytes=50_000)
ITEM = {"text": "a"}
DOCUMENT = Path(__file__).parents[2] / "services" / "kleash" / "reward" / "openapi.json"
CALL = json.loads('{"items": [{"tokens": {"tokens": {"ids_i32": "AQAAAA==", "count": 1}}}]}')


class HttpDoubler(Doubler):
    """With a path, and errors on demand."""

    http_api = HttpApi((HttpRoute("POST", "/double", SERVICE, "LogProbs"),), DOCUMENT)

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.was_cancelled = threading.Event()

    async def LogProbs(self, request: Any, context: Any) -> Any:
        if self.error is not None:
            raise self.error
        try:
            return await super().LogProbs(request, context)
        except BaseException:
            self.was_cancelled.set()
            raise


@pytest.fixture(scope="module")
def port(tiny_reward_folder: Path) -> Iterator[HttpPort]:
    with serving_reward(tiny_reward_folder, limits=LIMITS, max_message_bytes=MAX_BYTES) as (_, it):
        yield it


@pytest.mark.parametrize(
    ("body", "field", "reason"),
    [
        (b"", "", "BAD_JSON"),
        (b"{", "", "BAD_JSON"),
        (b"\xff", "", "BAD_JSON"),
        (b'{"items": [NaN]}', "", "BAD_JSON"),
        (b'{"items": [], "items": []}', "", "BAD_JSON"),
        (b'{"items": [' + b"[" * 40 + b"]" * 40 + b"]}", "", "BAD_JSON"),
        (b"[" * 50_000, "", "BAD_JSON"),
        (b'{"model": ' + b"9" * 5000 + b"}", "", "BAD_JSON"),
        (b"[]", "", "WRONG_TYPE"),
        (b"null", "", "WRONG_TYPE"),
        (b'{"items": {}}', "items", "WRONG_TYPE"),
        (b'{"items": [3]}', "items[0]", "WRONG_TYPE"),
        (b'{"items": [{"text": "a"}, {"text": 1}]}', "items[1].text", "WRONG_TYPE"),
        (b'{"items": [{"text": "\\ud800"}]}', "items[0].text", "WRONG_TYPE"),
        (b'{"items": [{"txet": "a"}]}', "items[0].txet", "UNKNOWN_FIELD"),
        (b'{"\\ud800": 1}', "?", "UNKNOWN_FIELD"),
        (
            b'{"items": [{"text": "a", "conversation": {"messages": []}}]}',
            "items[0].conversation",
            "WRONG_TYPE",
        ),
        (b'{"items": [{"item_id": "a", "itemId": "b"}]}', "items[0].itemId", "WRONG_TYPE"),
        (b'{"options": {"truncation": "SIDEWAYS"}}', "options.truncation", "WRONG_TYPE"),
        (b'{"options": {"truncation": "\\ud800"}}', "options.truncation", "WRONG_TYPE"),
        (b'{"options": {"truncation": 77}}', "options.truncation", "INVALID_ARGUMENT"),
        (b'{"options": {"isolate": 1}}', "options.isolate", "WRONG_TYPE"),
        (
            b'{"items": [{"tokens": {"tokens": {"ids_i32": "?", "count": 1}}}]}',
            "items[0].tokens.tokens.ids_i32",
            "WRONG_TYPE",
        ),
        (
            b'{"items": [{"tokens": {"tokens": {"count": -1}}}]}',
            "items[0].tokens.tokens.count",
            "WRONG_TYPE",
        ),
        (
            b'{"items": [{"tokens": {"tokens": {"count": 1e999}}}]}',
            "items[0].tokens.tokens.count",
            "WRONG_TYPE",
        ),
        (b'{"items": [{}]}', "items[0].input", "INVALID_ARGUMENT"),
        (json.dumps({"items": [ITEM] * 5}).encode(), "items", "TOO_LARGE"),
    ],
)
def test_a_bad_body_is_the_callers_mistake(
    port: HttpPort, body: bytes, field: str, reason: str
) -> None:
    reply = port.post("/v1/score", body)
    assert reply.status == 400, reply.body
    error = reply.error
    assert error["code"] == "INVALID_ARGUMENT"
    assert (error["field"], error["reason"]) == (field, reason)
    assert error["message"].endswith(".")
    assert len(error["message"]) < 600


def test_a_long_name_is_not_echoed_in_full(port: HttpPort) -> None:
    reply = port.post("/v1/score", {"x" * 40_000: 1})
    assert reply.error["reason"] == "UNKNOWN_FIELD"
    assert len(reply.body) < 1500


def test_a_body_over_the_limit_is_refused_as_it_comes(port: HttpPort) -> None:
    whole = port.post("/v1/score", b" " * (MAX_BYTES + 1))
    assert (whole.status, whole.error["reason"]) == (413, "MESSAGE_TOO_LARGE")
    assert whole.error["code"] == "INVALID_ARGUMENT"

    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BYTES // 10_000 + 1):
            yield b" " * 10_000

    connection = port.connection()
    connection.request("POST", "/v1/score", chunks(), JSON, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    line = port.ask("POST", "/v1/score_stream", b'{"item": "' + b"x" * 200_000, LINES)
    assert (line.status, line.error["reason"]) == (413, "MESSAGE_TOO_LARGE")


def test_a_body_that_says_it_is_too_large_is_not_read(port: HttpPort) -> None:
    connection = port.connection()
    connection.putrequest("POST", "/v1/score")
    for name, value in {**JSON, "Content-Length": str(10**12)}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_more_values_than_a_request_may_have_are_refused_before_parsing(
    tiny_reward_folder: Path,
) -> None:
    with serving_reward(tiny_reward_folder) as (_, port):
        reply = port.post("/v1/score", b'{"items": [' + b"{}," * 600_000 + b"{}]}")
    assert (reply.status, reply.error["reason"]) == (400, "TOO_LARGE")


def test_a_body_that_is_not_said_to_be_json_is_refused(port: HttpPort) -> None:
    raw = json.dumps({"items": [ITEM]}).encode()
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/jsonx"}):
        reply = port.ask("POST", "/v1/score", raw, headers)
        assert (reply.status, reply.error["field"]) == (415, "Content-Type")
    kind = {"Content-Type": "application/json; charset=utf-8"}
    assert port.ask("POST", "/v1/score", raw, kind).status == 200
    packed = port.post("/v1/score", gzip.compress(raw), {"Content-Encoding": "gzip"})
    assert (packed.status, packed.error["field"]) == (415, "Content-Encoding")


def test_paths_and_verbs_that_are_not_there(port: HttpPort) -> None:
    missing = port.post("/v1/nothing", {})
    assert (missing.status, missing.error["reason"]) == (404, "NO_SUCH_PATH")
    wrong = port.get("/v1/score")
    assert (wrong.status, wrong.error["reason"]) == (405, "METHOD_NOT_ALLOWED")
    assert wrong.headers["allow"] == "POST"
    assert port.post("/readyz", {}).headers["allow"] == "GET"
    assert port.post("/v1/score?model=x", {"items": [ITEM]}).error["field"] == "model"


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (errors.Overloaded("full.", retry_after_s=1.2), 429, {"retry-after": "2"}),
        (errors.Overloaded("never."), 429, {}),
        (errors.Unavailable("away."), 503, {}),
        (errors.DeadlineExceeded("late."), 504, {}),
        (errors.PermissionDenied("no."), 403, {}),
        (errors.Unauthenticated("who?"), 401, {"www-authenticate": "Bearer"}),
        (errors.NotFound("none."), 404, {}),
        (errors.Cancelled("gone."), 499, {}),
        (RuntimeError("secret detail"), 500, {}),
        (NotImplementedError("secret detail"), 501, {}),
    ],
)
def test_a_status_of_grpc_has_one_of_http(
    error: Exception, status: int, headers: dict[str, str]
) -> None:
    service = HttpDoubler()
    service.error = error
    with serving_http(service) as (_, port):
        reply = port.post("/double", CALL)
    assert reply.status == status
    told = reply.error
    if isinstance(error, errors.ServiceError):
        assert told["message"] == error.message
        assert told["code"] == error.code.name
    for name in ("retry-after", "www-authenticate"):
        assert reply.headers.get(name) == headers.get(name)
    assert b"secret" not in reply.body
    if status == 500:
        assert told["metadata"]["correlation_id"] in told["message"]


def test_every_status_of_grpc_is_known() -> None:
    for code in grpc.StatusCode:
        error = errors.ServiceError("x")
        error.code = code  # type: ignore[misc]
        assert status_of(error) >= 200


@pytest.mark.parametrize(
    "limit", [{"X-Request-Timeout-S": "0.2"}, {"Grpc-Timeout": "200m", "X-Request-Timeout-S": "9"}]
)
def test_the_callers_time_limit_holds(limit: dict[str, str]) -> None:
    service = HttpDoubler()
    with serving_http(service) as (_, port):
        service.gate.clear()
        reply = port.post("/double", CALL, limit)
        service.gate.set()
    assert (reply.status, reply.error["code"]) == (504, "DEADLINE_EXCEEDED")
    assert service.was_cancelled.is_set()


def test_the_servers_time_limit_holds_whatever_the_caller_says() -> None:
    service = HttpDoubler()
    with serving_http(service, max_request_s=0.3) as (_, port):
        service.gate.clear()
        reply = port.post("/double", CALL, {"X-Request-Timeout-S": "100"})
        service.gate.set()
    assert (reply.status, reply.error["reason"]) == (504, "SERVER_TIME_LIMIT")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Request-Timeout-S", "soon"),
        ("X-Request-Timeout-S", "-1"),
        ("X-Request-Timeout-S", "nan"),
        ("Grpc-Timeout", "5"),
        ("Grpc-Timeout", "123456789S"),
    ],
)
def test_a_time_limit_that_cannot_be_read_is_refused(port: HttpPort, name: str, value: str) -> None:
    reply = port.post("/v1/score", {"items": [ITEM]}, {name: value})
    assert (reply.status, reply.error["field"]) == (400, name)


def test_a_caller_that_leaves_cancels_its_call() -> None:
    service = HttpDoubler()
    with serving_http(service) as (_, port):
        service.gate.clear()
        connection = port.connection()
        connection.request("POST", "/double", json.dumps(CALL).encode(), JSON)
        assert service.entered.wait(WAIT_S)
        connection.close()
        assert service.was_cancelled.wait(WAIT_S)
        service.gate.set()


def test_calls_wait_for_the_model_and_probes_do_not() -> None:
    service, number = HttpDoubler(), free_port()
    service.may_load.clear()
    server = BackgroundServer([service], ServerConfig(http_port=number))
    thread = threading.Thread(target=server.__enter__)
    thread.start()
    port = HttpPort(number)

    def is_up() -> bool:
        try:
            return port.get("/healthz").status == 200
        except OSError:
            return False

    eventually(is_up)
    assert port.get("/readyz").status == 503
    reply = port.post("/double", CALL)
    assert (reply.status, reply.error["reason"]) == (503, "LOADING")
    service.may_load.set()
    thread.join()
    assert port.post("/double", CALL).status == 200
    server.__exit__()


def test_a_server_that_ends_finishes_running_calls_and_takes_no_more() -> None:
    service = HttpDoubler()
    replies: list[Reply] = []
    number = free_port()
    server = BackgroundServer([service], ServerConfig(http_port=number))
    server.__enter__()
    port = HttpPort(number)
    with contextlib.closing(port.connection()) as kept:
        assert ask(kept, "GET", "/readyz").status == 200
        service.gate.clear()
        caller = threading.Thread(target=lambda: replies.append(port.post("/double", CALL)))
        caller.start()
        assert service.entered.wait(WAIT_S)
        ending = threading.Thread(target=server.__exit__)
        ending.start()

        def is_closed() -> bool:
            try:
                port.get("/readyz")
            except ConnectionError:
                return True
            return False

        eventually(is_closed)
        with pytest.raises(ConnectionError):
            ask(kept, "GET", "/readyz")
    assert not replies
    service.gate.set()
    caller.join()
    ending.join()
    assert replies[0].status == 200
    assert replies[0].headers["connection"] == "close"


def test_while_a_server_drains_answers_end_their_connections() -> None:
    service = HttpDoubler()
    number = free_port()
    server = BackgroundServer([service], ServerConfig(http_port=number, drain_delay_s=3.0))
    server.__enter__()
    port = HttpPort(number)
    ending = threading.Thread(target=server.__exit__)
    ending.start()
    eventually(lambda: port.get("/readyz").status == 503)
    reply = port.post("/double", CALL)
    ending.join()
    assert reply.status == 200
    assert reply.headers["connection"] == "close"


def test_a_call_that_outlasts_the_grace_is_told() -> None:
    service = HttpDoubler()
    replies: list[Reply] = []
    with serving_http(service, drain_grace_s=0.3) as (_, port):
        service.gate.clear()
        caller = threading.Thread(target=lambda: replies.append(port.post("/double", CALL)))
        caller.start()
        assert service.entered.wait(WAIT_S)
        threading.Timer(1.0, service.gate.set).start()
    caller.join()
    assert (replies[0].status, replies[0].error["reason"]) == (503, "DRAINING")


def test_both_ports_answer_with_the_same_numbers() -> None:
    from kleash.reference.v1 import reference_pb2, reference_pb2_grpc

    with serving_http(HttpDoubler()) as (server, port):
        body = port.post("/double", CALL).json
        with grpc.insecure_channel(server.address) as channel:
            stub = reference_pb2_grpc.ReferenceServiceStub(channel)
            theirs = stub.LogProbs(request_of([1]), timeout=WAIT_S)
    assert first(theirs) == [2.0]
    assert body["results"][0]["log_probs"] == {"values_f32": "AAAAQA==", "count": 1}
    assert isinstance(theirs, reference_pb2.LogProbsResponse)
