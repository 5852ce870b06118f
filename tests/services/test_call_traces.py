"""A trace goes through clients and servers: gRPC by threads and asyncio, HTTP, batches, weights.

Clients and servers are in this process, so that the spans of both are in one file.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from tests.services.doubler import CALL_S, WAIT_S, Doubler, client, request_of, serving
from tests.services.http_client import HttpPort, serving_reward
from tests.tracing import Recording, recorded

from kleash.base import tracing
from kleash.base.trace_setup import ServiceTracingConfig
from kleash.client import AsyncRewardClient, InvalidRequest, NotFound, RewardClient
from kleash.client.policy import PolicyClient
from kleash.client.types import Prompt, Sampling
from kleash.policy.config import PolicyConfig
from kleash.policy.service import PolicyService
from kleash.rpc.background import background_loop
from kleash.rpc.call_spans import client_call
from kleash.rpc.server import BackgroundServer
from kleash.traces.read import CLIENT, SERVER, RecordedSpan

pytestmark = pytest.mark.services

T = TypeVar("T")
SECRET = "the quick brown fox"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def reward(tiny_reward_folder: Path) -> Iterator[tuple[BackgroundServer, HttpPort]]:
    with serving_reward(tiny_reward_folder) as both:
        yield both


@pytest.fixture
def its(tmp_path: Path) -> Iterator[Recording]:
    """Of what is called in a trace alone."""
    path = tmp_path / "spans.jsonl"
    config = ServiceTracingConfig(exporter="file", file=path, sample_ratio=0.0)
    with recorded(tmp_path, config) as recording:
        yield recording
        tracing.shut_down()


def step() -> Any:
    return tracing.root_span("ppo_step", is_sampled=True, step=1)


def run(work: Coroutine[Any, Any, T]) -> T:
    """In the event loop of the servers: gRPC wants one a process."""
    return asyncio.run_coroutine_threadsafe(work, background_loop()).result(60)


def sides(its: Recording, method: str) -> tuple[RecordedSpan, RecordedSpan]:
    """The client's span of the one call of a method, and the server's."""
    tracing.shut_down()
    (called,) = [span for span in its.named(method) if span.kind == CLIENT]
    (served,) = [span for span in its.named(method) if span.kind == SERVER]
    return called, served


def below(its: Recording, span: RecordedSpan) -> list[str]:
    return [each.name for each in its.spans if each.parent_id == span.span_id]


def check_score(its: Recording) -> None:
    """One Score, from the step to the model."""
    called, served = sides(its, "Score")
    assert called.parent_id == its.one("ppo_step").span_id
    assert served.parent_id == called.span_id
    assert served.trace_id == called.trace_id
    assert below(its, served) == ["tokenize", "queue", "compute", "encode"]
    for span in (called, served):
        assert span.name == "kleash.reward.v1.RewardService/Score"
        assert span.attributes["rpc.system"] == "grpc"
        assert span.attributes["rpc.service"] == "kleash.reward.v1.RewardService"
        assert span.attributes["rpc.method"] == "Score"
        assert span.attributes["rpc.grpc.status_code"] == 0
    assert SECRET not in its.text


def test_a_call_by_threads(reward: tuple[BackgroundServer, HttpPort], its: Recording) -> None:
    with RewardClient(reward[0].address) as scores:
        scores.get_model()
        with step():
            scores.score_texts([SECRET] * 2)
    check_score(its)
    called, _ = sides(its, "Score")
    assert called.attributes["server.address"] == "127.0.0.1"
    assert called.attributes["server.port"] == reward[0].address.rpartition(":")[2]


def test_a_call_by_asyncio(reward: tuple[BackgroundServer, HttpPort], its: Recording) -> None:
    async def work() -> None:
        async with AsyncRewardClient(reward[0].address) as scores:
            await scores.get_model()
            with step():
                await scores.score_texts([SECRET] * 2)

    run(work())
    check_score(its)


def test_the_calls_of_a_long_list_are_in_the_trace(
    reward: tuple[BackgroundServer, HttpPort], its: Recording
) -> None:
    """Threads of the client's own send them."""
    with RewardClient(reward[0].address, parallel_calls=2) as scores, step():
        limit = scores.get_model().limits.max_items
        scores.score_texts(["a"] * (limit + 1))
    tracing.shut_down()
    calls = [span for span in its.named("Score") if span.kind == CLIENT]
    assert len(calls) >= 2
    assert {span.parent_id for span in calls} == {its.one("ppo_step").span_id}


@pytest.mark.parametrize("is_aio", [False, True])
def test_a_stream(reward: tuple[BackgroundServer, HttpPort], its: Recording, is_aio: bool) -> None:
    async def work() -> None:
        async with AsyncRewardClient(reward[0].address) as scores:
            with step():
                assert len([score async for score in scores.score_stream([SECRET, "b"])]) == 2

    if is_aio:
        run(work())
    else:
        with RewardClient(reward[0].address) as scores, step():
            assert len(list(scores.score_stream([SECRET, "b"]))) == 2
    called, served = sides(its, "ScoreStream")
    assert served.parent_id == called.span_id
    assert called.attributes["rpc.grpc.status_code"] == 0
    assert below(its, served).count("compute") >= 1
    assert SECRET not in its.text


def test_the_call_of_another_application_over_http(
    reward: tuple[BackgroundServer, HttpPort], its: Recording
) -> None:
    body = {"items": [{"text": SECRET}]}
    assert reward[1].post("/v1/score", body, {"Traceparent": CALLER}).status == 200
    assert reward[1].post("/v1/score", body, {"Traceparent": CALLER[:-2] + "00"}).status == 200
    assert reward[1].post("/v1/score", body).status == 200
    tracing.shut_down()
    served = its.one("Score")
    assert (served.trace_id, served.parent_id) == (CALLER[3:35], CALLER[36:52])
    assert below(its, served) == ["tokenize", "queue", "compute", "encode"]
    assert SECRET not in its.text


def test_the_call_of_another_application_by_a_plain_stub(
    reward: tuple[BackgroundServer, HttpPort], its: Recording
) -> None:
    from kleash.reward.v1 import reward_pb2, reward_pb2_grpc

    with grpc.insecure_channel(reward[0].address) as channel:
        reward_pb2_grpc.RewardServiceStub(channel).ListModels(
            reward_pb2.ListModelsRequest(),
            metadata=(("traceparent", CALLER),),
            timeout=CALL_S,
            wait_for_ready=True,
        )
    tracing.shut_down()
    assert its.one("ListModels").trace_id == CALLER[3:35]


def test_a_refusal_is_told_by_its_status(
    reward: tuple[BackgroundServer, HttpPort], its: Recording
) -> None:
    with RewardClient(reward[0].address) as scores, step(), pytest.raises(NotFound):
        scores.pinned(f"sha256:{SECRET}").score_texts([SECRET])
    called, served = sides(its, "GetModel")
    for span in (called, served):
        assert span.has_failed
        assert span.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
        assert span.attributes["error.type"] in ("NOT_FOUND", "NotFound")
    assert SECRET not in its.text


def test_a_call_of_no_trace_begins_none_on_the_clients_side(tmp_path: Path) -> None:
    with recorded(tmp_path) as its, client_call("a.Service", "Watch", "host:1") as metadata:
        assert metadata == ()
    assert its.spans == []


def test_a_call_that_was_given_up_has_that_status(tmp_path: Path) -> None:
    with recorded(tmp_path) as its, step():
        with pytest.raises(GeneratorExit), client_call("a.Service", "Watch", "host:1"):
            raise GeneratorExit
        with pytest.raises(InvalidRequest), client_call("a.Service", "Score", "host:1"):
            raise InvalidRequest("secret")
    assert its.one("Watch").attributes["rpc.grpc.status_code"] == 1
    assert its.one("Score").attributes["rpc.grpc.status_code"] == 3
    assert "secret" not in its.text


def test_a_batch_of_several_calls_is_one_span_with_links(its: Recording) -> None:
    service = Doubler()
    with serving(service) as server, client(server.address) as stub, ThreadPoolExecutor(3) as pool:
        service.gate.clear()

        def call(number: int) -> None:
            with step(), client_call("a.Service", f"Call{number}", "host:1") as metadata:
                stub.LogProbs(request_of([number]), timeout=CALL_S, metadata=metadata)

        first = pool.submit(call, 1)
        assert service.entered.wait(WAIT_S)
        others = [pool.submit(call, number) for number in (2, 3)]
        while service.batcher.queued_tokens < 2:
            assert not any(other.done() for other in others)
        service.gate.set()
        for done in (first, *others):
            done.result(CALL_S)
    tracing.shut_down()
    alone, together = its.named("compute")
    served = {span.trace_id: span.span_id for span in its.named("LogProbs")}
    assert (alone.attributes["kleash.calls"], together.attributes["kleash.calls"]) == (1, 2)
    assert together.attributes["kleash.items"] == 2
    assert len(together.links) == 2
    assert set(together.links) | set(alone.links) == set(served.values())
    assert together.parent_id == together.links[0]
    queued = {span.parent_id: span for span in its.named("queue")}
    assert set(queued) == set(served.values())
    for link in together.links:
        assert queued[link].start_ns < alone.end_ns <= queued[link].end_ns


def test_generation_waits_and_decodes(tiny_folder: Path, its: Recording) -> None:
    config = PolicyConfig(model=tiny_folder, max_running_sequences=2)
    prompts = [Prompt(f"p{n}", np.array([1, 2, 3])) for n in range(3)]
    sampling = Sampling(seed=0, max_new_tokens=4)
    with (
        BackgroundServer([PolicyService(config)]) as server,
        PolicyClient(server.address) as policy,
        step(),
    ):
        assert len(list(policy.generate(prompts, sampling))) == 3
    called, served = sides(its, "Generate")
    assert served.parent_id == called.span_id
    assert below(its, served) == ["check", "queue", "decode"]
    decode = its.one("decode")
    assert decode.attributes == {"kleash.responses": 3}
    assert served.start_ns <= decode.start_ns <= decode.end_ns <= served.end_ns


def test_the_file_is_lines_of_otlp(
    reward: tuple[BackgroundServer, HttpPort], its: Recording
) -> None:
    """Read by the messages of OpenTelemetry, whose JSON has ids in hex where protobuf's has not."""
    from google.protobuf.json_format import ParseDict
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with RewardClient(reward[0].address) as scores, step():
        scores.score_texts([SECRET])
    tracing.shut_down()
    names = []
    for line in its.text.splitlines():
        request = json.loads(line)
        for span in request["resourceSpans"][0]["scopeSpans"][0]["spans"]:
            for its_id in (span, *span.get("links", ())):
                assert len(bytes.fromhex(its_id["traceId"])) == 16
                assert len(bytes.fromhex(its_id["spanId"])) == 8
        parsed = ParseDict(request, ExportTraceServiceRequest())
        names += [span.name for span in parsed.resource_spans[0].scope_spans[0].spans]
    assert "ppo_step" in names
