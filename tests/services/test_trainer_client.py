"""TrainerClient against a tiny run: watching without gaps, steering, errors by class."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from tests.services.doubler import eventually, free_port

from kleash.client import PreconditionFailed, TrainerClient, Unavailable
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.trainer.v1 import trainer_pb2, trainer_pb2_grpc

pytestmark = pytest.mark.services


class TinyRun(trainer_pb2_grpc.TrainerServiceServicer):
    """A run whose steps end when the test says so."""

    full_names = ("kleash.trainer.v1.TrainerService",)

    def __init__(self, *, total_steps: int = 6, step: int = 0) -> None:
        self.total_steps = total_steps
        self.step = step
        self.is_paused = False
        self.first_steps_asked: list[int] = []
        self.num_watchers = 0

    def load(self) -> None: ...

    def register(self, server: grpc.aio.Server) -> None:
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(self, server)

    async def start(self) -> None: ...

    def is_ready(self, full_name: str) -> bool:
        return True

    def heartbeat_age_s(self) -> float:
        return 0.0

    async def stop(self) -> None: ...

    def _state(self) -> trainer_pb2.RunState:
        return trainer_pb2.RUN_STATE_PAUSED if self.is_paused else trainer_pb2.RUN_STATE_RUNNING

    async def GetRun(self, request: Any, context: Any) -> trainer_pb2.GetRunResponse:
        return trainer_pb2.GetRunResponse(run_id="tiny", step=self.step, state=self._state())

    async def WatchSteps(
        self, request: trainer_pb2.WatchStepsRequest, context: Any
    ) -> AsyncIterator[trainer_pb2.WatchStepsResponse]:
        self.first_steps_asked.append(request.from_step)
        self.num_watchers += 1
        try:
            for step in range(request.from_step, self.total_steps + 1):
                while self.step < step:  # noqa: ASYNC110 - the test counts the steps in its thread
                    await asyncio.sleep(0.01)
                metrics = trainer_pb2.StepMetrics(step=step, values={"score_mean": step / 2})
                yield trainer_pb2.WatchStepsResponse(metrics=metrics)
        finally:
            self.num_watchers -= 1

    async def Pause(self, request: Any, context: Any) -> trainer_pb2.PauseResponse:
        self.is_paused = True
        return trainer_pb2.PauseResponse(state=self._state())

    async def Resume(self, request: Any, context: Any) -> trainer_pb2.ResumeResponse:
        self.is_paused = False
        return trainer_pb2.ResumeResponse(state=self._state())

    async def SaveCheckpoint(self, request: Any, context: Any) -> Any:
        raise PreconditionFailed("the run is over.", reason="RUN_IS_OVER")

    async def Stop(self, request: Any, context: Any) -> trainer_pb2.StopResponse:
        return trainer_pb2.StopResponse(state=trainer_pb2.RUN_STATE_STOPPING)


def test_steering() -> None:
    run = TinyRun(step=3)
    with BackgroundServer([run]) as server, TrainerClient(server.address, timeout_s=10) as client:
        assert client.get_run().step == 3
        assert client.pause().state == trainer_pb2.RUN_STATE_PAUSED
        assert client.get_run().state == trainer_pb2.RUN_STATE_PAUSED
        assert client.resume().state == trainer_pb2.RUN_STATE_RUNNING
        assert client.stop().state == trainer_pb2.RUN_STATE_STOPPING
        with pytest.raises(PreconditionFailed, match="run is over") as caught:
            client.save_checkpoint()
        assert caught.value.reason == "RUN_IS_OVER"


def test_watch_sends_past_steps_and_ends_with_the_run() -> None:
    run = TinyRun(step=6)
    with BackgroundServer([run]) as server, TrainerClient(server.address) as client:
        steps = list(client.watch_steps(from_step=2))
    assert [step.step for step in steps] == [2, 3, 4, 5, 6]
    assert steps[0].values["score_mean"] == 1.0


def test_watch_from_zero_sends_new_steps_only() -> None:
    run = TinyRun(step=4)
    with BackgroundServer([run]) as server, TrainerClient(server.address) as client:
        watched = client.watch_steps()
        threading.Timer(0.2, lambda: setattr(run, "step", 6)).start()
        assert [step.step for step in watched] == [5, 6]


def test_watch_goes_on_past_the_servers_time_limit_and_its_restart() -> None:
    run = TinyRun(step=2)
    config = ServerConfig(port=free_port(), max_request_s=0.3, drain_grace_s=0.0)
    with TrainerClient(f"127.0.0.1:{config.port}") as client:
        with BackgroundServer([run], config):
            watched = client.watch_steps(from_step=1)
            seen = [step.step for step in itertools.islice(watched, 2)]
            threading.Timer(0.8, lambda: setattr(run, "step", 3)).start()
            seen.append(next(watched).step)
            assert run.first_steps_asked[:2] == [1, 3]
        run.step = 6
        with BackgroundServer([run], config):
            seen += [step.step for step in watched]
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_watcher_that_leaves_frees_its_handler() -> None:
    run = TinyRun(step=2)
    with BackgroundServer([run]) as server:
        with TrainerClient(server.address) as client:
            assert next(client.watch_steps(from_step=1)).step == 1
            assert run.num_watchers == 1
        eventually(lambda: run.num_watchers == 0)


def test_a_trainer_that_is_not_there_is_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    with (
        TrainerClient(address, timeout_s=5) as client,
        pytest.raises(Unavailable, match=f"cannot reach the service at {address}"),
    ):
        client.stop()
