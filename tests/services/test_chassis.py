"""Calls through the chassis: overload, cancellation, failures, limits, over real gRPC."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from tests.services.doubler import (
    CALL_S,
    SERVICE,
    WAIT_S,
    Doubler,
    client,
    error_of,
    eventually,
    first,
    health_of,
    hold,
    request_of,
    serving,
)

from kleash.reference.v1 import reference_pb2, reference_pb2_grpc
from kleash.rpc import errors
from kleash.rpc.channel import MAX_MESSAGE_BYTES
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.trainer.v1 import trainer_pb2, trainer_pb2_grpc

pytestmark = pytest.mark.services


def test_a_call_is_answered() -> None:
    with serving() as server, client(server.address) as stub:
        assert first(stub.LogProbs(request_of([1, 2, 3]), timeout=CALL_S)) == [2, 4, 6]


def test_overload_is_refused_at_once_and_the_bundled_channel_waits_as_told() -> None:
    service = Doubler(max_queued_tokens=10)
    with serving(service) as server, client(server.address, retry=False) as stub:
        held = hold(service, stub, 1)
        waiting = stub.LogProbs.future(request_of([2] * 8), timeout=WAIT_S)
        eventually(lambda: service.batcher.queued_tokens == 8)
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            stub.LogProbs(request_of([3] * 3), timeout=CALL_S)
        assert time.monotonic() - began < 2
        refused = errors.from_rpc_error(caught.value)
        assert isinstance(refused, errors.Overloaded)
        assert refused.retry_after_s == 1.0
        assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"  # type: ignore[attr-defined]

        with client(server.address) as patient:
            # Larger than gRPC's default retry buffer, past which a call is not tried again.
            began = time.monotonic()
            call = patient.LogProbs.future(request_of([4] * 5, padding=1 << 20), timeout=WAIT_S)
            time.sleep(0.3)
            assert not call.done()
            service.gate.set()
            assert first(call.result()) == [8] * 5
            assert 0.9 < time.monotonic() - began < 10
        assert first(waiting.result()) == [4] * 8
        assert first(held.result()) == [2]


def test_health_answers_while_the_queue_is_full() -> None:
    service = Doubler(max_queued_tokens=10)
    with serving(service) as server, client(server.address, retry=False) as stub:
        calls = [hold(service, stub, 1)]
        calls.append(stub.LogProbs.future(request_of([2] * 10), timeout=WAIT_S))
        eventually(lambda: service.batcher.queued_tokens == 10)
        began = time.monotonic()
        assert health_of(server.address, SERVICE) == "SERVING"
        assert health_of(server.address, "liveness") == "SERVING"
        assert time.monotonic() - began < 2
        assert not any(call.done() for call in calls)


def test_cancelled_and_expired_calls_leave_the_queue_before_compute() -> None:
    service = Doubler()
    with serving(service) as server, client(server.address) as stub:
        held = hold(service, stub, 1)
        gone = stub.LogProbs.future(request_of([2] * 10), timeout=WAIT_S)
        late = stub.LogProbs.future(request_of([3] * 20), timeout=1)
        stays = stub.LogProbs.future(request_of([4] * 30), timeout=WAIT_S)
        eventually(lambda: service.batcher.queued_tokens == 60)
        gone.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            late.result()
        assert isinstance(errors.from_rpc_error(caught.value), errors.DeadlineExceeded)
        eventually(lambda: service.batcher.queued_tokens == 30)
        service.gate.set()
        assert first(stays.result()) == [8] * 30
        held.result()
    assert service.batches == [[1], [4]]


def test_one_failing_batch_does_not_sink_the_others() -> None:
    service = Doubler()
    with serving(service) as server, client(server.address) as stub:
        held = hold(service, stub, 1)
        # 60 + 60 tokens are over the budget of 100: the two are never in one batch.
        bad = stub.LogProbs.future(request_of([13] * 60), timeout=WAIT_S)
        good = stub.LogProbs.future(request_of([5] * 60), timeout=WAIT_S)
        eventually(lambda: service.batcher.queued_tokens == 120)
        service.gate.set()
        assert first(good.result()) == [10] * 60
        with pytest.raises(grpc.RpcError):
            bad.result()
        assert first(held.result()) == [2]


def test_an_unexpected_error_tells_an_id_and_no_detail(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server, client(server.address) as stub:
        error = error_of(stub.LogProbs, request_of([13]))
    assert isinstance(error, errors.InternalError)
    identity = error.metadata["correlation_id"]
    assert identity in str(error)
    assert "secret" not in repr(vars(error))
    records = [record for record in caplog.records if identity in record.getMessage()]
    assert len(records) == 1
    assert "secret detail" in str(records[0].exc_info)


def test_a_malformed_request_names_the_field() -> None:
    request = request_of([1], [2, 3])
    request.items[1].tokens.tokens.count = 3
    with serving() as server, client(server.address) as stub:
        error = error_of(stub.LogProbs, request)
    assert isinstance(error, errors.InvalidRequest)
    assert error.field == "items[1].tokens.tokens.ids_i32"


def test_a_message_over_the_limit_is_the_callers_mistake() -> None:
    with serving(max_message_bytes=4096) as server, client(server.address, retry=False) as stub:
        error = error_of(stub.LogProbs, request_of([1], padding=5000))
        assert isinstance(error, errors.InvalidRequest)
        assert "too large" in str(error)
    with serving() as server, client(server.address) as stub:
        large = request_of([1], padding=8 << 20)
        assert MAX_MESSAGE_BYTES > large.ByteSize() > 4 << 20
        assert first(stub.LogProbs(large, timeout=CALL_S)) == [2]


def test_the_server_caps_the_time_of_a_call() -> None:
    service = Doubler()
    with serving(service, max_request_s=0.3) as server, client(server.address) as stub:
        service.gate.clear()
        error = error_of(stub.LogProbs, request_of([1]))
        assert isinstance(error, errors.DeadlineExceeded)
        assert error.reason == "SERVER_TIME_LIMIT"


def test_an_unknown_method_and_an_unwritten_one_are_unimplemented() -> None:
    with serving() as server, client(server.address) as stub:
        assert "does not offer" in str(error_of(stub.GetModel, reference_pb2.GetModelRequest()))
        with (
            grpc.insecure_channel(server.address) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            channel.unary_unary("/no.such.Service/Method")(b"", timeout=CALL_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_reflection_lists_the_services() -> None:
    with serving() as server, grpc.insecure_channel(server.address) as channel:
        names = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {SERVICE, "grpc.health.v1.Health"} <= names


def test_fast_pings_of_a_client_are_welcome() -> None:
    """With a misspelt key gRPC ends this call with "Too many pings" after 4.1 s."""
    service = Doubler()
    options = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    with serving(service) as server, grpc.insecure_channel(server.address, options) as channel:
        call = hold(service, reference_pb2_grpc.ReferenceServiceStub(channel), 1)
        with pytest.raises(grpc.FutureTimeoutError):
            call.exception(timeout=5)
        service.gate.set()
        assert first(call.result()) == [2]


class Flood(trainer_pb2_grpc.TrainerServiceServicer):
    """WatchSteps writes from several tasks, far more than a caller that does not read can take."""

    full_names = ("kleash.trainer.v1.TrainerService",)
    message = trainer_pb2.WatchStepsResponse(
        metrics=trainer_pb2.StepMetrics(values={"x" * 100_000: 1.0})
    )

    def load(self) -> None: ...

    def register(self, server: grpc.aio.Server) -> None:
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(self, server)

    async def start(self) -> None: ...

    def is_ready(self, full_name: str) -> bool:
        return True

    def heartbeat_age_s(self) -> float:
        return 0.0

    async def stop(self) -> None: ...

    async def WatchSteps(self, request: Any, context: Any) -> None:
        async def write_many() -> None:
            for _ in range(100):
                await context.write(self.message)

        async def fail_soon() -> None:
            await asyncio.sleep(0.2)
            raise errors.InvalidRequest("enough.", field="from_step")

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(3):
                    tasks.create_task(write_many())
                if request.from_step:
                    tasks.create_task(fail_soon())
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from None


@pytest.mark.parametrize(
    ("from_step", "expected"), [(1, errors.InvalidRequest), (0, errors.DeadlineExceeded)]
)
def test_a_stream_that_ends_during_a_write_has_a_status(from_step: int, expected: type) -> None:
    config = ServerConfig(max_request_s=0.4)
    with (
        BackgroundServer([Flood()], config) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = trainer_pb2_grpc.TrainerServiceStub(channel)
        stream = stub.WatchSteps(trainer_pb2.WatchStepsRequest(from_step=from_step), timeout=20)
        time.sleep(0.6)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
    error = errors.from_rpc_error(caught.value)
    assert type(error) is expected
    assert error.reason in ("INVALID_ARGUMENT", "SERVER_TIME_LIMIT")  # written by the server
