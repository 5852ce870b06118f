"""Metrics of the bundled clients: off unless asked for, and right for every way a call can end."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from prometheus_client import REGISTRY
from tests.services.doubler import eventually
from tests.services.scripted_reward import SERVICE, ScriptedReward, serving

from kleash.base.errors import ConfigError
from kleash.client import AsyncRewardClient, Credentials, RewardClient
from kleash.reward.v1 import reward_pb2
from kleash.rpc.background import background_loop
from kleash.rpc.errors import NotFound, Overloaded, ServiceError

pytestmark = pytest.mark.services

T = TypeVar("T")
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def run(work: Coroutine[Any, Any, T]) -> T:
    """In the event loop of the servers: gRPC wants one a process."""
    return asyncio.run_coroutine_threadsafe(work, background_loop()).result(60)


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLEASH_CLIENT_METRICS", "1")


@pytest.fixture
def service() -> ScriptedReward:
    return ScriptedReward()


@pytest.fixture
def address(service: ScriptedReward) -> Iterator[str]:
    with serving(service) as server:
        yield server.address


class Counts:
    """How much the series of a method have grown since this was made."""

    def __init__(self, method: str, kind: str = "unary") -> None:
        self._labels = {"grpc_service": SERVICE, "grpc_method": method}
        self._kind = {"grpc_type": kind}
        self._before: dict[str, float] = {}
        self._before = {"started": self.started, "retries": self.retries, "timed": self.timed}
        self._handled = self._all_handled()

    @property
    def started(self) -> float:
        return self._grown("started", "grpc_client_started_total", self._kind)

    @property
    def timed(self) -> float:
        return self._grown("timed", "grpc_client_handling_seconds_count", self._kind)

    @property
    def retries(self) -> float:
        return self._grown("retries", "kleash_client_retries_total", {})

    @property
    def handled(self) -> dict[str, float]:
        """By status, those that have grown."""
        now = self._all_handled()
        grown = {code: now[code] - self._handled.get(code, 0) for code in now}
        return {code: count for code, count in grown.items() if count}

    def _grown(self, name: str, series: str, more: dict[str, str]) -> float:
        value = REGISTRY.get_sample_value(series, {**self._labels, **more}) or 0.0
        return value - self._before.get(name, 0.0)

    def _all_handled(self) -> dict[str, float]:
        wanted = {**self._labels, **self._kind}
        return {
            sample.labels["grpc_code"]: sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name == "grpc_client_handled_total"
            and wanted.items() <= sample.labels.items()
        }


def test_a_call_counts_once(address: str) -> None:
    with RewardClient(address) as client:
        counts = Counts("CountTokens")
        client.count_tokens(["one", "two"])
    assert (counts.started, counts.handled, counts.timed) == (1, {"OK": 1}, 1)
    assert counts.retries == 0


def test_so_does_a_call_with_a_token(address: str) -> None:
    """Its channel is one that follows the files of the credentials."""
    with RewardClient(address, credentials=Credentials(token="secret")) as client:
        counts = Counts("CountTokens")
        client.count_tokens(["one"])
    assert (counts.started, counts.handled) == (1, {"OK": 1})


def test_a_refusal_counts_by_its_status(service: ScriptedReward, address: str) -> None:
    with RewardClient(address) as client:
        client.get_model()
        service.refusals.append(NotFound("no such revision.", reason="REVISION_NOT_SERVED"))
        counts = Counts("Score")
        with pytest.raises(NotFound):
            client.score_texts(["text"])
    assert (counts.started, counts.handled, counts.timed) == (1, {"NOT_FOUND": 1}, 1)


def test_a_busy_service_costs_calls_and_retries(service: ScriptedReward, address: str) -> None:
    with RewardClient(address) as client:
        client.get_model()
        busy = Overloaded("full.", reason="QUEUE_FULL", retry_after_s=0.01)
        service.refusals.extend([busy] * 7)  # five attempts of gRPC's, in one call of ours
        counts = Counts("Score")
        assert len(client.score_texts(["text"])) == 1
    assert (counts.started, counts.retries) == (2, 1)
    assert counts.handled == {"RESOURCE_EXHAUSTED": 1, "OK": 1}


def test_a_stream_counts_at_its_end(address: str) -> None:
    with RewardClient(address) as client:
        counts = Counts("ScoreStream", "bidi_stream")
        assert len(list(client.score_stream(["one", "two"]))) == 2
        eventually(lambda: counts.handled == {"OK": 1})
    assert (counts.started, counts.timed) == (1, 1)


def test_a_stream_that_is_left_counts_as_cancelled(service: ScriptedReward, address: str) -> None:
    go_on = threading.Event()

    def texts() -> Iterator[str]:
        yield "one"
        go_on.wait(20)

    with RewardClient(address) as client:
        counts = Counts("ScoreStream", "bidi_stream")
        stream = client.score_stream(texts())
        next(stream)
        stream.close()
        eventually(lambda: counts.handled == {"CANCELLED": 1})
        go_on.set()
    assert counts.started == 1


def test_a_client_that_is_closed_ends_its_calls(service: ScriptedReward, address: str) -> None:
    client = RewardClient(address)
    client.get_model()
    service.gate.clear()
    counts = Counts("Score")
    failures: list[ServiceError] = []

    def call() -> None:
        try:
            client.score_texts(["text"])
        except ServiceError as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    eventually(lambda: service.num_running == 1)
    client.close()
    thread.join(20)
    service.gate.set()
    assert len(failures) == 1
    assert (counts.started, counts.handled) == (1, {"CANCELLED": 1})


def test_calls_of_an_event_loop_count_likewise(service: ScriptedReward, address: str) -> None:
    async def work() -> None:
        async with AsyncRewardClient(address) as client:
            await client.count_tokens(["one"])
            service.refusals.append(NotFound("no such revision.", reason="REVISION_NOT_SERVED"))
            with pytest.raises(NotFound):
                await client.score_texts(["text"])
            busy = Overloaded("full.", reason="QUEUE_FULL", retry_after_s=0.01)
            service.refusals.extend([busy] * 7)
            await client.score_texts(["text"])

    counting, scoring = Counts("CountTokens"), Counts("Score")
    run(work())
    eventually(lambda: counting.handled == {"OK": 1})
    eventually(lambda: scoring.handled == {"NOT_FOUND": 1, "RESOURCE_EXHAUSTED": 1, "OK": 1})
    assert (counting.started, scoring.started, scoring.retries) == (1, 3, 1)
    assert scoring.timed == 3


def test_a_task_that_is_cancelled_cancels_and_counts(service: ScriptedReward, address: str) -> None:
    async def work() -> None:
        async with AsyncRewardClient(address) as client:
            await client.get_model()
            service.gate.clear()
            task = asyncio.create_task(client.score_texts(["text"]))
            async with asyncio.timeout(20):
                while not service.num_running:  # noqa: ASYNC110, another thread's
                    await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    counts = Counts("Score")
    run(work())
    eventually(lambda: counts.handled == {"CANCELLED": 1})
    eventually(lambda: service.num_cancelled == 1)
    service.gate.set()


def test_streams_of_an_event_loop(address: str) -> None:
    async def texts() -> AsyncIterator[str]:
        yield "one"
        await asyncio.Event().wait()

    async def work() -> None:
        async with AsyncRewardClient(address) as client:
            assert len([score async for score in client.score_stream(["one", "two"])]) == 2
            async with aclosing(client.score_stream(texts())) as stream:
                await anext(stream)

    counts = Counts("ScoreStream", "bidi_stream")
    run(work())
    eventually(lambda: counts.handled == {"OK": 1, "CANCELLED": 1})
    assert counts.started == 2


# -------------------------------------------------------------------------------- asking for them


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without the variable unless it is given."""
    its = {name: value for name, value in os.environ.items() if name != "KLEASH_CLIENT_METRICS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**its, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


CALL = """
import sys
from kleash.client import RewardClient
with RewardClient({address!r}) as reward:
    reward.count_tokens(["one"])
print("prometheus_client" in sys.modules)
"""


def test_nothing_is_counted_and_loaded_unless_asked_for(address: str) -> None:
    assert python(CALL.format(address=address)).stdout == "False\n"
    asked = python(CALL.format(address=address), KLEASH_CLIENT_METRICS="0")
    assert asked.stdout == "False\n"
    asked = python(CALL.format(address=address), KLEASH_CLIENT_METRICS="1")
    assert asked.stdout == "True\n"


def test_without_prometheus_client_one_sentence_tells_what_to_do(address: str) -> None:
    absent = "import sys; sys.modules['prometheus_client'] = None\n"
    done = python(absent + CALL.format(address=address), KLEASH_CLIENT_METRICS="1")
    last = done.stderr.splitlines()[-1]
    assert "metrics of calls need prometheus_client" in last
    assert "pip install prometheus-client" in last
    done = python(absent + "from kleash.client import metrics; metrics.enable()")
    assert "pip install prometheus-client" in done.stderr.splitlines()[-1]


def test_any_other_value_is_an_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLEASH_CLIENT_METRICS", "yes")
    with pytest.raises(ConfigError, match="KLEASH_CLIENT_METRICS is 'yes'; set it to 1"):
        RewardClient(address)


def test_the_example_of_the_page_counts_its_calls(address: str) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert "127.0.0.1:50051" in example
    show = "\nimport prometheus_client; print(prometheus_client.generate_latest().decode())"
    done = python(example.replace("127.0.0.1:50051", address) + show)
    labels = f'grpc_code="OK",grpc_method="Score",grpc_service="{SERVICE}",grpc_type="unary"'
    assert f"grpc_client_handled_total{{{labels}}} 1.0" in done.stdout
    assert "kleash_queue" not in done.stdout
    assert done.stderr == ""


def test_requests_carry_what_they_did_without(service: ScriptedReward, address: str) -> None:
    with RewardClient(address) as client:
        client.score_texts(["a" * 7])
    (request,) = service.asked(reward_pb2.ScoreRequest)
    assert [item.text for item in request.items] == ["a" * 7]
