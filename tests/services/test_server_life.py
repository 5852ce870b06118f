"""The life of a server: ports, loading, health, metrics, drain at a signal."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.services.doubler import (
    CALL_S,
    SERVICE,
    WAIT_S,
    Doubler,
    client,
    error_of,
    eventually,
    first,
    free_port,
    health_of,
    process,
    request_of,
    serving,
)

from kleash.base.errors import UserError
from kleash.reference.v1 import reference_pb2_grpc
from kleash.rpc import errors

pytestmark = pytest.mark.services

RECONNECT_SOON = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 20)]


def test_health_while_loading_serving_unready_and_stuck() -> None:
    service = Doubler()
    service.may_load.clear()
    seen: list[int] = []
    port, health_port = free_port(), free_port()
    address = f"127.0.0.1:{port}"

    def watch() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{health_port}", RECONNECT_SOON) as channel:
            request = health_pb2.HealthCheckRequest(service=SERVICE)
            stub: Any = health_pb2_grpc.HealthStub(channel)
            seen.extend(answer.status for answer in stub.Watch(request, wait_for_ready=True))

    def call_while_loading() -> errors.ServiceError:
        with grpc.insecure_channel(address, RECONNECT_SOON) as channel:
            stub = reference_pb2_grpc.ReferenceServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.LogProbs(request_of([1]), wait_for_ready=True, timeout=CALL_S)
        eventually(lambda: seen)
        service.may_load.set()
        return errors.from_rpc_error(caught.value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor() as threads:
        early = threads.submit(call_while_loading)
        with serving(service, port=port, health_port=health_port, liveness_limit_s=5):
            _check_states(service, address, early.result())
    watcher.join(WAIT_S)
    states = health_pb2.HealthCheckResponse
    serving_twice = [states.SERVING, states.NOT_SERVING] * 2
    assert seen == [states.NOT_SERVING, *serving_twice]


def _check_states(service: Doubler, address: str, while_loading: errors.ServiceError) -> None:
    assert isinstance(while_loading, errors.Unavailable)
    assert while_loading.reason == "LOADING"
    assert health_of(address, "") == "SERVING"
    service.ready = False
    eventually(lambda: health_of(address, SERVICE) == "NOT_SERVING")
    assert health_of(address, "") == "NOT_SERVING"
    assert health_of(address, "liveness") == "SERVING"
    with client(address) as stub:
        assert isinstance(error_of(stub.LogProbs, request_of([1])), errors.Unavailable)
    service.ready, service.stuck_s = True, 6.0
    eventually(lambda: health_of(address, "liveness") == "NOT_SERVING")


def test_health_lists_every_name() -> None:
    with serving() as server, grpc.insecure_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        messages: Any = health_pb2
        statuses = stub.List(messages.HealthListRequest(), timeout=CALL_S).statuses
    assert {name: answer.status for name, answer in statuses.items()} == dict.fromkeys(
        ["", SERVICE, "liveness"], health_pb2.HealthCheckResponse.SERVING
    )


def test_open_watches_do_not_hold_up_the_end() -> None:
    with serving(drain_grace_s=WAIT_S) as server:
        channel = grpc.insecure_channel(server.address)
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert [answer.status for answer in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
    channel.close()


def test_the_metrics_page() -> None:
    port = free_port()
    with serving(metrics_port=port) as server, client(server.address) as stub:
        stub.LogProbs(request_of([1, 2]), timeout=CALL_S)
        with pytest.raises(grpc.RpcError):
            grpc.insecure_channel(server.address).unary_unary("/x.Y/Z")(b"", timeout=CALL_S)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=CALL_S) as page:
            text = page.read().decode()
    labels = f'grpc_method="LogProbs",grpc_service="{SERVICE}",grpc_type="unary"'
    for line in (
        f'grpc_server_handled_total{{grpc_code="OK",{labels}}} ',
        f"grpc_server_handling_seconds_count{{{labels}}} ",
        'grpc_server_handled_total{grpc_code="UNIMPLEMENTED",grpc_method="other",',
        'kleash_queue_tokens{model_name="",service="reference"} 0.0',
        'kleash_model_loaded{service="reference"} 1.0',
        "kleash_batcher_heartbeat_timestamp_seconds",
    ):
        assert line in text
    assert "_created" not in text
    assert "grpc.health" not in text


@pytest.mark.parametrize("key", ["port", "health_port", "metrics_port"])
def test_a_port_in_use_is_one_sentence(key: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError) as caught, serving(**{key: port}):
            pass
    expected = f"port {port} on 127.0.0.1 is in use; choose another with --server.{key}."
    assert str(caught.value) == expected


def test_two_servers_do_not_share_a_port() -> None:
    with serving() as server, pytest.raises(UserError, match="in use"), serving(port=server.port):
        pass


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (
            "no-such-host.invalid",
            "host 'no-such-host.invalid' cannot be resolved; set --server.host",
        ),
        ("192.0.2.1", "192.0.2.1 is not an address of this machine; set --server.host"),
    ],
)
def test_a_host_that_cannot_be_used_is_one_sentence(host: str, expected: str) -> None:
    with pytest.raises(UserError) as caught, serving(host=host):
        pass
    assert str(caught.value).startswith(expected)


def test_a_failing_load_is_raised_and_frees_the_port() -> None:
    class Broken(Doubler):
        def load(self) -> None:
            raise UserError("folder x has no weights.")

    port = free_port()
    with pytest.raises(UserError, match="has no weights"), serving(Broken(), port=port):
        pass
    with serving(port=port) as server, client(server.address) as stub:
        assert first(stub.LogProbs(request_of([1]), timeout=CALL_S)) == [2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals) -> None:
    """NOT_SERVING at once, new calls served during the delay, running calls end, status 0."""
    options = ("--compute_s=1.0", "--drain_delay_s=1.0")
    with process(*options) as (server, address), client(address, retry=False) as stub:
        assert health_of(address, SERVICE) == "SERVING"
        running = stub.LogProbs.future(request_of([1]), timeout=WAIT_S)
        time.sleep(0.2)
        server.send_signal(number)
        eventually(lambda: health_of(address, SERVICE) == "NOT_SERVING")
        assert health_of(address, "liveness") == "SERVING"
        late = stub.LogProbs.future(request_of([2]), timeout=WAIT_S)
        assert first(running.result()) == [2]
        assert first(late.result()) == [4]
        assert server.wait(WAIT_S) == 0
        assert isinstance(error_of(stub.LogProbs, request_of([3])), errors.Unavailable)


def test_a_server_may_announce_its_end_before_it_is_not_serving() -> None:
    """So that the address of its successor can become known."""
    with process("--drain_announce_s=1.5", "--drain_delay_s=1.0") as (server, address):
        began = time.monotonic()
        server.terminate()
        time.sleep(0.5)
        with client(address, retry=False) as stub:
            assert health_of(address, SERVICE) == "SERVING"
            assert first(stub.LogProbs(request_of([1]), timeout=CALL_S)) == [2]
            eventually(lambda: health_of(address, SERVICE) == "NOT_SERVING")
            assert time.monotonic() - began >= 1.4
        assert server.wait(WAIT_S) == 0


def test_a_signal_ends_a_process_that_still_loads() -> None:
    with process("--load_s=60") as (server, word):
        assert word == "loading"
        began = time.monotonic()
        server.terminate()
        assert server.wait(WAIT_S) == 0
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_server_at_once(number: signal.Signals) -> None:
    """Though a call runs that would have a minute to end."""
    options = ("--compute_s=60.0", "--drain_grace_s=60.0", "--drain_delay_s=60.0")
    with process(*options) as (server, address), client(address, retry=False) as stub:
        stub.LogProbs.future(request_of([1]), timeout=WAIT_S)
        server.send_signal(number)
        eventually(lambda: health_of(address, SERVICE) == "NOT_SERVING")
        server.send_signal(number)
        assert server.wait(WAIT_S) == 128 + number


def test_a_second_signal_ends_process_one_of_a_container_at_once() -> None:
    """The kernel drops what process 1 has no handler for, so that "as before" would be nothing."""
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("a process 1 of one's own needs root and unshare")
    namespace = ("unshare", "--pid", "--fork", "--kill-child")
    with process("--drain_delay_s=60.0", before=namespace) as (outer, address):
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        first_process = int(children.read_text().split()[0])
        os.kill(first_process, signal.SIGTERM)
        eventually(lambda: health_of(address, SERVICE) == "NOT_SERVING")
        os.kill(first_process, signal.SIGTERM)
        assert outer.wait(WAIT_S) == 128 + signal.SIGTERM
