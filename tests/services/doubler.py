"""A tiny service for tests of the chassis; run as a script it is a server process.

python tests/services/doubler.py [--load_s=S] [--compute_s=S] [--key=value of ServerConfig ...]
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kleash.reference.v1 import reference_pb2, reference_pb2_grpc
from kleash.rpc import errors
from kleash.rpc.batcher import Batcher
from kleash.rpc.channel import connect
from kleash.rpc.codec import decode_floats, decode_ids, encode_floats, encode_ids
from kleash.rpc.server import BackgroundServer, ServerConfig, serve

SERVICE = "kleash.reference.v1.ReferenceService"
WAIT_S = 20.0
CALL_S = 10.0


class Doubler(reference_pb2_grpc.ReferenceServiceServicer):
    """LogProbs answers twice each id. A closed gate holds the model; id 13 breaks its batch."""

    full_names = (SERVICE,)

    def __init__(self, *, max_queued_tokens: int = 1000) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.may_load = threading.Event()
        self.may_load.set()
        self.batches: list[list[int]] = []
        self.ready = True
        self.stuck_s = 0.0
        self._max_queued_tokens = max_queued_tokens

    def load(self) -> None:
        assert self.may_load.wait(WAIT_S)

    def register(self, server: grpc.aio.Server) -> None:
        self.batcher: Batcher[np.ndarray, np.ndarray] = Batcher(
            self._compute,
            size=len,
            max_batch_tokens=100,
            max_queued_tokens=self._max_queued_tokens,
            service="reference",
        )
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(self, server)

    async def start(self) -> None:
        await self.batcher.start()

    def is_ready(self, full_name: str) -> bool:
        return self.ready

    def heartbeat_age_s(self) -> float:
        return self.stuck_s or self.batcher.heartbeat_age_s()

    async def stop(self) -> None:
        await self.batcher.stop()

    def _compute(self, items: list[np.ndarray]) -> list[np.ndarray]:
        self.batches.append([int(item[0]) for item in items])
        self.entered.set()
        assert self.gate.wait(WAIT_S)
        if any(item[0] == 13 for item in items):
            raise RuntimeError("secret detail")
        return [2 * item.astype(np.float32) for item in items]

    async def LogProbs(
        self, request: reference_pb2.LogProbsRequest, context: Any
    ) -> reference_pb2.LogProbsResponse:
        arrays = [
            decode_ids(item.tokens.tokens, field=f"items[{index}].tokens.tokens")
            for index, item in enumerate(request.items)
        ]
        timing = await self.batcher.submit(arrays, isolate=request.isolate)
        results = [
            reference_pb2.LogProbsResult(log_probs=encode_floats(result))
            for result in timing.results
        ]
        return reference_pb2.LogProbsResponse(results=results)


def request_of(*lists: list[int], padding: int = 0) -> reference_pb2.LogProbsRequest:
    """A request with the given ids; ``padding`` makes it that many bytes larger."""
    request = reference_pb2.LogProbsRequest()
    for ids in lists:
        item = request.items.add(item_id="x" * padding)
        item.tokens.tokens.CopyFrom(encode_ids(ids))
    return request


def first(response: reference_pb2.LogProbsResponse) -> list[float]:
    return decode_floats(response.results[0].log_probs, field="results[0].log_probs").tolist()


@contextmanager
def client(address: str, *, retry: bool = True) -> Iterator[Any]:
    """A stub over the bundled channel, or over a plain one that never retries."""
    channel = (
        connect(address, service=SERVICE, methods_to_retry=["LogProbs"])
        if retry
        else grpc.insecure_channel(address, options=[("grpc.enable_retries", 0)])
    )
    with channel:
        yield reference_pb2_grpc.ReferenceServiceStub(channel)


@contextmanager
def serving(service: Doubler | None = None, **options: Any) -> Iterator[BackgroundServer]:
    service = service or Doubler()
    with BackgroundServer([service], ServerConfig(**options)) as server:
        try:
            yield server
        finally:
            service.gate.set()


def health_of(address: str, name: str) -> str:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=name)
        stub: Any = health_pb2_grpc.HealthStub(channel)
        response = stub.Check(request, timeout=CALL_S)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def error_of(call: Any, *arguments: Any) -> errors.ServiceError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, timeout=CALL_S)
    return errors.from_rpc_error(caught.value)


def eventually(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def hold(service: Doubler, stub: Any, *ids: int) -> grpc.Future:
    """A call that the model computes until the gate opens."""
    service.gate.clear()
    service.entered.clear()
    call = stub.LogProbs.future(request_of(list(ids)), timeout=WAIT_S)
    assert service.entered.wait(WAIT_S)
    return call


@contextmanager
def process(
    *arguments: str, before: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """This file as a server of its own; yields it and its address, ended by the test or here.

    ``before``: the beginning of the command, of a program that starts it.
    """
    command = [*before, sys.executable, str(Path(__file__)), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server, server.stdout.readline().strip()
        finally:
            server.kill()


def main(arguments: list[str]) -> None:
    """Serve a Doubler; prints its address when ready, or "loading" when that takes load_s."""
    pairs = (argument.removeprefix("--").split("=") for argument in arguments)
    options: dict[str, Any] = {key: float(value) for key, value in pairs}
    load_s, compute_s = options.pop("load_s", 0.0), options.pop("compute_s", 0.0)

    class Slow(Doubler):
        def load(self) -> None:
            if load_s:
                print("loading", flush=True)
                time.sleep(load_s)

        def _compute(self, items: list[np.ndarray]) -> list[np.ndarray]:
            time.sleep(compute_s)
            return super()._compute(items)

    def announce(port: int) -> None:
        print(f"127.0.0.1:{port}", flush=True)

    asyncio.run(serve([Slow()], ServerConfig(**options), on_ready=announce))


if __name__ == "__main__":
    main(sys.argv[1:])
