"""Every path of the HTTP port, compared with the gRPC answer of the same server."""

from __future__ import annotations

import base64
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format
from prometheus_client import REGISTRY
from tests.services.doubler import CALL_S, WAIT_S, Doubler, eventually
from tests.services.http_client import LINES, HttpPort, serving_http, serving_reward

from kleash.base.errors import UserError
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.ports import listen
from kleash.rpc.requests import Limits
from kleash.rpc.server import BackgroundServer

pytestmark = pytest.mark.services

MAX_BYTES = 100_000
LIMITS = Limits(
    max_items=8,
    max_item_tokens=60,
    max_batch_tokens=512,
    max_queued_tokens=4096,
    max_message_bytes=MAX_BYTES,
)
TURNS = [{"role": "user", "content": "What is 3 plus 4?"}]
ANSWER = {"role": "assistant", "content": "3 plus 4 is 7."}
ITEMS = [
    {"item_id": "a", "conversation": {"messages": [*TURNS, ANSWER]}},
    {"item_id": "b", "text": "<|user|>Hello<|assistant|>Hi. Häuser, \u732b<|end|>"},
    {"item_id": "c", "text": "word " * 200},
]


@pytest.fixture(scope="module")
def both(tiny_reward_folder: Path) -> Iterator[tuple[BackgroundServer, HttpPort]]:
    with serving_reward(tiny_reward_folder, limits=LIMITS, max_message_bytes=MAX_BYTES) as both:
        yield both


@pytest.fixture
def port(both: tuple[BackgroundServer, HttpPort]) -> HttpPort:
    return both[1]


@pytest.fixture
def stub(both: tuple[BackgroundServer, HttpPort]) -> Iterator[Any]:
    with grpc.insecure_channel(both[0].address) as channel:
        yield reward_pb2_grpc.RewardServiceStub(channel)


def message(make: Any, value: Any) -> Any:
    return json_format.ParseDict(value, make())


def same(mine: Any, theirs: Any) -> None:
    """Two messages, but for what a call took."""
    for each in (mine, theirs):
        if hasattr(each, "usage"):
            each.usage.queue_ns = each.usage.tokenize_ns = each.usage.compute_ns = 0
    assert mine == theirs


@pytest.mark.parametrize("options", [{}, {"normalize": True, "truncation": "TRUNCATION_LEFT"}])
def test_score_answers_what_grpc_answers(
    port: HttpPort, stub: Any, options: dict[str, Any]
) -> None:
    body = {"items": ITEMS, "options": {"isolate": True, **options}}
    reply = port.post("/v1/score", body)
    assert reply.status == 200
    mine = message(reward_pb2.ScoreResponse, reply.json)
    same(mine, stub.Score(message(reward_pb2.ScoreRequest, body), timeout=CALL_S))
    assert len({result.score for result in mine.results}) > 1
    assert reply.json["results"][0]["code"] == "ITEM_STATUS_CODE_OK"
    assert reply.json["usage"]["tokens"] == str(mine.usage.tokens)


def test_fields_are_written_in_one_spelling_and_even_when_zero(port: HttpPort) -> None:
    body = {"items": [{"itemId": "x", "text": "a"}], "options": {"returnTokenScores": True}}
    result = port.post("/v1/score", body).json["results"][0]
    assert result["item_id"] == "x"
    assert result["truncated"] is False
    assert result["components"] == []
    raw = base64.b64decode(result["token_scores"]["values_f32"])
    values = np.frombuffer(raw, "<f4")
    assert len(values) == result["token_scores"]["count"] == result["token_count"]
    assert values[-1] == np.float32(result["score"])


def test_token_ids_go_in_as_base64(port: HttpPort, stub: Any) -> None:
    digest = port.get("/v1/model").json["tokenizer_sha256"]
    ids = np.array([5, 6, 7, 8], "<i4")
    raw = base64.b64encode(ids.tobytes()).decode()
    tokens = {"tokens": {"ids_i32": raw, "count": 4}, "tokenizer_sha256": digest}
    body = {"items": [{"tokens": tokens}], "options": {"isolate": True}}
    mine = message(reward_pb2.ScoreResponse, port.post("/v1/score", body).json)
    same(mine, stub.Score(message(reward_pb2.ScoreRequest, body), timeout=CALL_S))
    assert mine.results[0].token_count == 4
    tokens["tokenizer_sha256"] = "another"
    error = port.post("/v1/score", body)
    assert error.status == 400
    assert error.error["code"] == "FAILED_PRECONDITION"
    assert error.error["reason"] == "TOKENIZER_MISMATCH"
    assert error.error["metadata"] == {"requested": "another", "served": digest}


def test_compare_answers_what_grpc_answers(port: HttpPort, stub: Any) -> None:
    body = {
        "prompt": {"messages": TURNS},
        "responses": ["It is 7.", "It is 8, or so.", "word " * 200],
        "options": {"isolate": True},
    }
    reply = port.post("/v1/compare", body)
    mine = message(reward_pb2.CompareResponse, reply.json)
    same(mine, stub.Compare(message(reward_pb2.CompareRequest, body), timeout=CALL_S))
    assert sorted(reply.json["ranking"]) == [0, 1]


def test_count_tokens_answers_what_grpc_answers(port: HttpPort, stub: Any) -> None:
    body = {"items": ITEMS}
    mine = message(reward_pb2.CountTokensResponse, port.post("/v1/count_tokens", body).json)
    same(mine, stub.CountTokens(message(reward_pb2.CountTokensRequest, body), timeout=CALL_S))
    assert len(mine.token_counts) == 3


def test_models_are_described_as_by_grpc(port: HttpPort, stub: Any) -> None:
    described = port.get("/v1/model").json
    theirs = stub.GetModel(reward_pb2.GetModelRequest(), timeout=CALL_S)
    same(message(reward_pb2.GetModelResponse, described), theirs)
    name, revision = theirs.model.name, theirs.model.revision
    assert port.get(f"/v1/model?model={name}&revision={revision}").json == described
    listed = message(reward_pb2.ListModelsResponse, port.get("/v1/models").json)
    same(listed, stub.ListModels(reward_pb2.ListModelsRequest(), timeout=CALL_S))
    missing = port.get("/v1/model?model=no-such")
    assert (missing.status, missing.error["code"]) == (404, "NOT_FOUND")
    assert missing.error["reason"] == "MODEL_NOT_SERVED"
    unknown = port.get("/v1/model?nodel=x")
    assert (unknown.status, unknown.error["field"]) == (400, "nodel")
    twice = port.get("/v1/model?model=a&model=b")
    assert (twice.status, twice.error["field"]) == (400, "model")


def test_a_stream_of_lines_is_scored(port: HttpPort, stub: Any) -> None:
    lines = [{"item": item} for item in ITEMS]
    lines[0]["options"] = {"isolate": True, "truncation": "TRUNCATION_RIGHT"}
    raw = b"\n".join(json.dumps(line).encode() for line in lines) + b"\n\n"
    reply = port.ask("POST", "/v1/score_stream", raw, LINES)
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/x-ndjson"
    mine = [
        message(reward_pb2.ScoreStreamResponse, json.loads(line))
        for line in reply.body.splitlines()
    ]
    requests = [message(reward_pb2.ScoreStreamRequest, line) for line in lines]
    theirs = list(stub.ScoreStream(iter(requests), timeout=CALL_S))
    by_id = lambda each: each.result.item_id  # noqa: E731
    assert sorted(mine, key=by_id) == sorted(theirs, key=by_id)
    assert len(mine) == 3


def test_a_stream_answers_while_it_is_sent(port: HttpPort) -> None:
    connection = port.connection()
    connection.putrequest("POST", "/v1/score_stream")
    for name, value in {**LINES, "Transfer-Encoding": "chunked"}.items():
        connection.putheader(name, value)
    connection.endheaders()

    def send(value: Any) -> None:
        raw = json.dumps(value).encode() + b"\n"
        connection.send(b"%x\r\n%s\r\n" % (len(raw), raw))

    send({"item": {"item_id": "first", "text": "a"}})
    response = connection.getresponse()
    assert json.loads(response.readline())["result"]["item_id"] == "first"
    send({"item": {"item_id": "second", "text": "b"}})
    assert json.loads(response.readline())["result"]["item_id"] == "second"
    send({"item": {"text": 3}})
    error = json.loads(response.readline())["error"]
    assert (error["code"], error["field"]) == ("INVALID_ARGUMENT", "item.text")
    assert error["message"].startswith("line 3: ")
    assert response.read() == b""
    connection.close()


def test_a_stream_that_fails_before_its_first_result_has_a_status(port: HttpPort) -> None:
    reply = port.ask("POST", "/v1/score_stream", b'{"item": {"text": "a"}, "model": "no"}', LINES)
    assert (reply.status, reply.error["reason"]) == (404, "MODEL_NOT_SERVED")
    empty = port.ask("POST", "/v1/score_stream", b"", LINES)
    assert (empty.status, empty.body) == (200, b"")


def test_probes_and_pages_are_there(port: HttpPort) -> None:
    for path in ("/healthz", "/readyz"):
        reply = port.get(path)
        assert (reply.status, reply.json) == (200, {"status": "SERVING"})
    head = port.ask("HEAD", "/readyz")
    assert (head.status, head.body) == (200, b"")
    document = port.get("/openapi.json").json
    assert document["openapi"] == "3.1.0"
    assert document["paths"]["/v1/score"]["post"]["security"] == []
    page = port.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert b"http://" not in page.body
    assert b"https://" not in page.body


def test_readiness_is_that_of_the_services(
    tiny_reward_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = RewardService(RewardConfig(model=tiny_reward_folder))
    with serving_http(service) as (_, port):
        assert port.get("/readyz").status == 200
        monkeypatch.setattr(service, "is_ready", lambda name: False)
        eventually(lambda: port.get("/readyz").status == 503)
        assert port.get("/readyz").json == {"status": "NOT_SERVING"}
        assert port.get("/healthz").status == 200


def test_a_call_counts_as_its_method_and_as_a_request(port: HttpPort) -> None:
    def counts() -> list[float]:
        labels = {
            "grpc_type": "unary",
            "grpc_service": "kleash.reward.v1.RewardService",
            "grpc_method": "Score",
        }
        found = [
            REGISTRY.get_sample_value("grpc_server_started_total", labels),
            REGISTRY.get_sample_value("grpc_server_handled_total", labels | {"grpc_code": "OK"}),
            REGISTRY.get_sample_value(
                "grpc_server_handled_total", labels | {"grpc_code": "INVALID_ARGUMENT"}
            ),
        ]
        for path, status in (("/v1/score", "200"), ("/v1/score", "400"), ("other", "404")):
            found.append(
                REGISTRY.get_sample_value(
                    "kleash_http_requests_total", {"path": path, "status": status}
                )
            )
        return [value or 0.0 for value in found]

    before = counts()
    assert port.post("/v1/score", {"items": [{"text": "a"}]}).status == 200
    assert port.post("/v1/score", {"items": 3}).status == 400
    assert port.get("/no/such/path").status == 404
    after = counts()
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 1, 1, 1, 1, 1]


def test_a_connection_is_kept_for_the_next_request(port: HttpPort) -> None:
    connection = port.connection()
    for _ in range(2):
        connection.request("GET", "/v1/models")
        response = connection.getresponse()
        assert response.status == 200
        response.read()
        assert connection.sock is not None
    connection.close()


def test_other_sites_pages_may_call_only_when_named(
    port: HttpPort, tiny_reward_folder: Path
) -> None:
    origin = {"Origin": "https://app.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in port.get("/v1/models", origin).headers
    origins = ("https://app.example",)
    with serving_reward(tiny_reward_folder, http_allowed_origins=origins) as (_, open_port):
        asked = open_port.ask("OPTIONS", "/v1/score", headers=preflight)
        assert asked.status == 204
        assert "Authorization" in asked.headers["access-control-allow-headers"]
        reply = open_port.get("/v1/models", origin)
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        other = open_port.get("/v1/models", {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        assert other.headers["vary"] == "Origin"


def test_without_reflection_there_is_no_page(tiny_reward_folder: Path) -> None:
    with serving_reward(tiny_reward_folder, reflection=False) as (_, port):
        assert port.get("/docs").status == port.get("/openapi.json").status == 404
        assert port.get("/readyz").status == 200


def test_a_service_without_http_says_so() -> None:
    with (
        pytest.raises(UserError, match=r"ReferenceService is not served over HTTP"),
        serving_http(Doubler()),
    ):
        pass


def test_a_taken_port_names_its_key(both: tuple[BackgroundServer, HttpPort]) -> None:
    with pytest.raises(UserError, match=r"in use; choose another with --server\.http_port"):
        listen("127.0.0.1", both[1].port, key="server.http_port")


def test_what_is_no_http_is_answered_in_json(port: HttpPort) -> None:
    labels = {"path": "other", "status": "400"}
    before = REGISTRY.get_sample_value("kleash_http_requests_total", labels) or 0.0
    connection = port.connection()
    connection.connect()
    assert connection.sock is not None
    connection.sock.sendall(b"\x16\x03\x01\x02\x00 nonsense\r\n\r\n")
    response = http.client.HTTPResponse(connection.sock)
    response.begin()
    assert response.status == 400
    assert json.loads(response.read())["error"]["reason"] == "BAD_HTTP"
    connection.close()
    assert REGISTRY.get_sample_value("kleash_http_requests_total", labels) == before + 1


@pytest.mark.parametrize("version", [b"0.9", b"2.0"])
def test_other_versions_of_http_are_answered_in_ours(port: HttpPort, version: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port.port), timeout=WAIT_S) as caller:
        caller.sendall(b"GET /healthz HTTP/%s\r\nHost: localhost\r\n\r\n" % version)
        response = http.client.HTTPResponse(caller)
        response.begin()
        assert (response.version, response.status) == (11, 400)
        assert json.loads(response.read())["error"]["reason"] == "BAD_HTTP"
