"""Quotas, precedence, sizes and the audit log, over real gRPC."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY
from tests.services.doubler import (
    CALL_S,
    SERVICE,
    WAIT_S,
    Doubler,
    error_of,
    eventually,
    first,
    health_of,
    hold,
    request_of,
    serving,
)

from kleash.client.reward import RewardClient
from kleash.reference.v1 import reference_pb2_grpc
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.channel import connect
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import InvalidRequest, NotFound, Overloaded, from_rpc_error
from kleash.rpc.requests import Limits
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.rpc.static_tokens import make_token

pytestmark = pytest.mark.services


@contextmanager
def caller(address: str, credentials: Credentials) -> Iterator[Any]:
    """A stub that never retries."""
    with connect(
        address, service=SERVICE, methods_to_retry=(), checks_health=False, credentials=credentials
    ) as channel:
        yield reference_pb2_grpc.ReferenceServiceStub(channel)


def rejected(reason: str, service: str = "reference") -> float:
    labels = {"service": service, "reason": reason}
    return REGISTRY.get_sample_value("kleash_requests_rejected_total", labels) or 0.0


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Credentials]:
    """Credentials by name, and the file that the server reads in ``keys_file``."""
    made = {name: make_token(name) for name in ("team-a", "team-b", "my-trainer-1")}
    (tmp_path / "keys").write_text("".join(f"{line}\n" for _, line in made.values()))
    return {name: Credentials(token=token) for name, (token, _) in made.items()}


@pytest.fixture
def auth(keys: dict[str, Credentials], tmp_path: Path) -> dict[str, Any]:
    return {"mode": "token", "tokens_file": tmp_path / "keys"}


def test_a_caller_over_its_quota_is_refused_and_others_are_not(
    keys: dict[str, Credentials], auth: dict[str, Any]
) -> None:
    quotas = [{"callers": ["team-*"], "max_tokens_per_s": 0.5, "burst_tokens": 10}]
    before = rejected("quota")
    with (
        serving(auth=auth, quotas=quotas) as server,
        caller(server.address, keys["team-a"]) as a,
        caller(server.address, keys["team-b"]) as b,
        caller(server.address, keys["my-trainer-1"]) as trainer,
    ):
        a.LogProbs(request_of([1] * 8), timeout=CALL_S)
        error = error_of(a.LogProbs, request_of([1] * 8))
        assert isinstance(error, Overloaded)
        assert error.reason == "QUOTA"
        assert "'team-a' has 8 tokens, and 0.5 a second" in error.message
        assert error.retry_after_s is not None
        assert 8 < error.retry_after_s <= 12  # six tokens are missing
        b.LogProbs(request_of([1] * 8), timeout=CALL_S)
        for _ in range(3):
            trainer.LogProbs(request_of([1] * 50), timeout=CALL_S)
        assert rejected("quota") == before + 1
        a.LogProbs(request_of([1] * 2), timeout=CALL_S)
        error = error_of(a.LogProbs, request_of([1]))
        assert error.reason == "QUOTA"


def test_a_caller_in_debt_is_refused_before_its_request_is_parsed(
    keys: dict[str, Credentials], auth: dict[str, Any]
) -> None:
    quotas = [{"callers": ["*"], "max_tokens_per_s": 0.1, "burst_tokens": 5}]
    with serving(auth=auth, quotas=quotas) as server:
        credentials = keys["team-a"]
        with caller(server.address, credentials) as stub:
            stub.LogProbs(request_of([1] * 20), timeout=CALL_S)
        with (
            connect(
                server.address,
                service=SERVICE,
                methods_to_retry=(),
                checks_health=False,
                credentials=credentials,
            ) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            channel.unary_unary(f"/{SERVICE}/LogProbs")(b"\xff" * 9, timeout=CALL_S)
    assert from_rpc_error(caught.value).reason == "QUOTA"


def test_running_calls_are_counted_and_end(
    keys: dict[str, Credentials], auth: dict[str, Any]
) -> None:
    service = Doubler()
    quotas = [{"callers": ["team-a"], "max_running_calls": 2}]
    with (
        serving(service, auth=auth, quotas=quotas) as server,
        caller(server.address, keys["team-a"]) as stub,
    ):
        held = hold(service, stub, 1)
        waiting = stub.LogProbs.future(request_of([2]), timeout=WAIT_S)
        eventually(lambda: service.batcher.queued_tokens == 1)
        error = error_of(stub.LogProbs, request_of([3]))
        assert error.reason == "QUOTA"
        assert "2 calls under way" in error.message
        waiting.cancel()
        eventually(lambda: service.batcher.queued_tokens == 0)
        again = stub.LogProbs.future(request_of([4]), timeout=WAIT_S)
        eventually(lambda: service.batcher.queued_tokens == 1)
        service.gate.set()
        assert first(held.result()) == [2]
        assert first(again.result()) == [8]
        for _ in range(5):
            stub.LogProbs(request_of([5]), timeout=CALL_S)


def _served_first(server: Any, service: Doubler, one: Credentials, two: Credentials) -> list[int]:
    """Calls of ``one`` come first, then one of ``two``; which ids were computed in which order."""
    with caller(server.address, one) as stub, caller(server.address, two) as late:
        calls = [hold(service, stub, 1)]
        for number in (2, 3):
            calls.append(stub.LogProbs.future(request_of([number] * 90), timeout=WAIT_S))
            eventually(lambda n=number: service.batcher.queued_tokens == 90 * (n - 1))
        calls.append(late.LogProbs.future(request_of([4] * 90), timeout=WAIT_S))
        eventually(lambda: service.batcher.queued_tokens == 270)
        service.gate.set()
        for call in calls:
            call.result()
    return [batch[0] for batch in service.batches]


def test_a_trainer_goes_first_by_its_proven_name(
    keys: dict[str, Credentials], auth: dict[str, Any]
) -> None:
    service = Doubler()
    with serving(service, auth=auth) as server:
        order = _served_first(server, service, keys["team-a"], keys["my-trainer-1"])
    assert order == [1, 4, 2, 3]
    service = Doubler()
    claims = Credentials(token=keys["team-b"].token, caller="trainer")
    with serving(service, auth=auth) as server:
        assert _served_first(server, service, keys["team-a"], claims) == [1, 2, 3, 4]


def test_a_trainer_goes_first_by_its_claim_where_nobody_is_asked() -> None:
    service = Doubler()
    with serving(service) as server:
        order = _served_first(server, service, Credentials(), Credentials(caller="trainer"))
    assert order == [1, 4, 2, 3]


def test_health_answers_while_a_request_of_tiny_items_is_refused() -> None:
    """Thirty million empty items: parsed, they would hold the event loop for seconds."""
    raw = b"\x0a\x00" * (31 << 20)
    waits: list[float] = []
    done = threading.Event()
    with (
        serving() as server,
        grpc.insecure_channel(
            server.address, options=[("grpc.max_send_message_length", 64 << 20)]
        ) as channel,
    ):
        before = rejected("too_large")

        def watch() -> None:
            while not done.is_set():
                began = time.monotonic()
                assert health_of(server.address, SERVICE) == "SERVING"
                waits.append(time.monotonic() - began)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/{SERVICE}/LogProbs")(raw, timeout=CALL_S)
        finally:
            done.set()
            watcher.join()
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidRequest)
        assert error.reason == "TOO_LARGE"
        assert "more than 524288 fields" in error.message
        assert rejected("too_large") == before + 1
        assert waits


@pytest.fixture
def reward(tiny_reward_folder: Path, keys: dict[str, Credentials], auth: Any) -> Iterator[Any]:
    """Makes reward servers, with the keys and other settings."""

    @contextmanager
    def serve(**options: Any) -> Iterator[RewardClient]:
        service = RewardService(RewardConfig(model=tiny_reward_folder, limits=Limits()))
        config = ServerConfig.model_validate({"auth": auth, **options})
        with (
            BackgroundServer([service], config) as server,
            RewardClient(server.address, credentials=keys["team-a"]) as client,
        ):
            yield client

    return serve  # type: ignore[return-value]


def test_counting_tokens_takes_none_and_is_a_call_like_any_other(
    reward: Any, keys: dict[str, Credentials]
) -> None:
    """A caller may size its requests for nothing, but not while it owes tokens."""
    quotas = [{"callers": ["*"], "max_tokens_per_s": 0.1, "burst_tokens": 5}]
    count = reward_pb2.CountTokensRequest(items=[reward_pb2.ScoreItem(text="a" * 500)])
    score = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(text="more than five tokens")])
    with (
        reward(quotas=quotas) as client,
        connect(
            client._address,
            service="kleash.reward.v1.RewardService",
            methods_to_retry=(),
            checks_health=False,
            credentials=keys["team-a"],
        ) as channel,
    ):
        stub: Any = reward_pb2_grpc.RewardServiceStub(channel)
        for _ in range(3):
            (tokens,) = stub.CountTokens(count, timeout=CALL_S).token_counts
            assert tokens > 5
        stub.Score(score, timeout=CALL_S)
        error = error_of(stub.CountTokens, count)
    assert error.reason == "QUOTA"
    assert "has used up its tokens" in error.message


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "kleash.audit"]


def _fields(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split(" "))


def test_the_audit_tells_model_items_and_tokens_and_no_text(
    reward: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kleash.audit")
    with reward() as client:
        served = client.get_model().model
        counts = client.count_tokens(["secret words", "more"])
        client.score_texts(["secret words", "more"])
        client.compare("a secret", ["b", "c", "d"])
        list(client.score_stream(["secret words", "more", "even more"]))
        with pytest.raises(NotFound):
            client.with_options(model="no such\nstatus=OK").score_texts(["secret"])
        eventually(lambda: len(_lines(caplog)) >= 6)
    lines = _lines(caplog)
    assert "secret" not in "".join(lines)
    methods = {line.split("method=")[1].split(" ")[0].rpartition("/")[2]: line for line in lines}
    score = _fields(methods["Score"].replace('"no such\\nstatus=OK"', "X"))
    by_method = {name: _fields(line) for name, line in methods.items() if name != "Score"}
    assert score["status"] == "NOT_FOUND"
    assert score["model"] == "X"
    good = next(_fields(x) for x in lines if "/Score " in x and "status=OK reason" in x)
    assert good["caller"] == "team-a"
    assert good["model"] == served.name
    assert good["revision"] == served.revision
    assert good["items"] == "2"
    assert int(good["tokens"]) == sum(counts)
    assert float(good["ms"]) > 0
    assert by_method["Compare"]["items"] == "3"
    assert by_method["ScoreStream"]["items"] == "3"
    assert by_method["CountTokens"]["items"] == "2"
    assert by_method["GetModel"]["items"] == "-"


def test_the_audit_tells_the_text_when_asked_to(
    reward: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kleash.audit")
    with reward(audit="text") as client:
        client.score_texts(["secret\nwords"])
        list(client.score_stream(["streamed"]))
        eventually(lambda: len(_lines(caplog)) >= 6)
    told = [line.partition(" request=")[2] for line in _lines(caplog) if " request=" in line]
    texts = [json.loads(each) for each in told]
    assert {"items": [{"text": "secret\nwords"}]}.items() <= next(
        each for each in texts if each.get("items")
    ).items()
    assert any(each.get("item", {}).get("text") == "streamed" for each in texts)


def test_the_audit_can_be_turned_off_and_on(
    reward: Any, tiny_reward_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kleash.audit")
    with reward(audit="off") as client:
        client.score_texts(["x"])
    assert not _lines(caplog)
    service = RewardService(RewardConfig(model=tiny_reward_folder))
    with (
        BackgroundServer([service], ServerConfig(audit="calls")) as server,
        RewardClient(server.address, credentials=Credentials()) as client,
    ):
        client.score_texts(["x"])
    assert all(line.startswith("caller=- peer=ipv4:") for line in _lines(caplog))
    assert any("/Score status=OK" in line for line in _lines(caplog))


def test_large_requests_within_the_limits_are_answered(reward: Any) -> None:
    """Past the size from which fields are counted first."""
    with reward() as client:
        items = [reward_pb2.ScoreItem(text="hi", item_id="x" * 3000) for _ in range(1000)]
        request = reward_pb2.ScoreRequest(items=items)
        assert request.ByteSize() > 2 << 20
        assert len(client._stub.Score(request, timeout=CALL_S).results) == 1000
