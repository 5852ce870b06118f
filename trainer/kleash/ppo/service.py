"""The trainer's own gRPC service: a thin door to Control; the training loop never waits for it."""

# Method names are those of the proto; every handler gets a request and a context.
# ruff: noqa: N802, ARG002

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from typing import Any

import grpc

from kleash.ppo import http
from kleash.ppo.control import Control, RunState, SavedCheckpoint, Snapshot
from kleash.rpc.errors import PreconditionFailed
from kleash.trainer.v1 import trainer_pb2, trainer_pb2_grpc


class TrainerService(trainer_pb2_grpc.TrainerServiceServicer):
    """kleash.trainer.v1.TrainerService, hosted by the chassis of kleash.rpc."""

    full_names = ("kleash.trainer.v1.TrainerService",)
    http_api = http.API

    def __init__(self, control: Control) -> None:
        self._control = control
        self._is_stopping = False

    # --------------------------------------------------------------------------- the chassis asks

    def load(self) -> None:
        """Nothing: the models belong to the training loop."""

    def register(self, server: grpc.aio.Server) -> None:
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(self, server)

    async def start(self) -> None:
        """Nothing runs beside the handlers."""

    def is_ready(self, full_name: str) -> bool:
        return True

    def heartbeat_age_s(self) -> float:
        """0: a long step is not a hang, and killing the process would not cure one."""
        return 0.0

    async def stop(self) -> None:
        """Watchers see the end of their stream."""
        self._is_stopping = True

    # ----------------------------------------------------------------------------------- handlers

    async def GetRun(
        self, request: trainer_pb2.GetRunRequest, context: Any
    ) -> trainer_pb2.GetRunResponse:
        snapshot = self._control.snapshot
        steps = self._control.steps
        run = _run(snapshot)
        run.config_json = snapshot.config_json
        if steps:
            run.last_step.CopyFrom(_step_metrics(steps[-1]))
        return run

    async def WatchSteps(
        self, request: trainer_pb2.WatchStepsRequest, context: Any
    ) -> AsyncIterator[trainer_pb2.WatchStepsResponse]:
        control, told = self._control, None
        with _news_of(control) as news:
            position = 0 if request.from_step else len(control.steps)
            while True:
                news.clear()
                is_over, snapshot = control.is_over, control.snapshot
                news_of_run = replace(snapshot, step=0, weights_version=0)
                if request.include_run and told is None:
                    yield trainer_pb2.WatchStepsResponse(run=_run(snapshot))
                    told = news_of_run
                while position < len(control.steps):
                    metrics = control.steps[position]
                    position += 1
                    if metrics["step"] >= request.from_step:
                        yield trainer_pb2.WatchStepsResponse(metrics=_step_metrics(metrics))
                if request.include_run and told != news_of_run:
                    yield trainer_pb2.WatchStepsResponse(run=_run(snapshot))
                    told = news_of_run
                if is_over or self._is_stopping:
                    return
                await _first(news, timeout_s=1.0)

    async def ListSamples(
        self, request: trainer_pb2.ListSamplesRequest, context: Any
    ) -> trainer_pb2.ListSamplesResponse:
        rows = self._control.samples
        return trainer_pb2.ListSamplesResponse(
            step=rows[0]["step"] if rows else 0, samples=[_sample(row) for row in rows]
        )

    async def Pause(
        self, request: trainer_pb2.PauseRequest, context: Any
    ) -> trainer_pb2.PauseResponse:
        return trainer_pb2.PauseResponse(state=_state(self._control.pause()))

    async def Resume(
        self, request: trainer_pb2.ResumeRequest, context: Any
    ) -> trainer_pb2.ResumeResponse:
        return trainer_pb2.ResumeResponse(state=_state(self._control.resume()))

    async def SaveCheckpoint(
        self, request: trainer_pb2.SaveCheckpointRequest, context: Any
    ) -> trainer_pb2.SaveCheckpointResponse:
        try:
            saved: SavedCheckpoint = await asyncio.wrap_future(self._control.request_checkpoint())
        except RuntimeError as error:
            raise PreconditionFailed(
                f"no checkpoint was written: {error}", reason="RUN_IS_OVER"
            ) from None
        return trainer_pb2.SaveCheckpointResponse(path=str(saved.path), step=saved.step)

    async def Stop(
        self, request: trainer_pb2.StopRequest, context: Any
    ) -> trainer_pb2.StopResponse:
        return trainer_pb2.StopResponse(state=_state(self._control.stop()))


@contextlib.contextmanager
def _news_of(control: Control) -> Iterator[asyncio.Event]:
    """Set whenever a step was added or the run has changed."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def listener() -> None:
        loop.call_soon_threadsafe(news.set)

    control.add_listener(listener)
    try:
        yield news
    finally:
        control.remove_listener(listener)


async def _first(news: asyncio.Event, *, timeout_s: float) -> None:
    """Until there are news, or for ``timeout_s``: then the server may be about to stop."""
    try:
        await asyncio.wait_for(news.wait(), timeout_s)
    except TimeoutError:
        return


def _state(state: RunState) -> Any:
    return trainer_pb2.RunState.Value(f"RUN_STATE_{state.name}")


def _run(snapshot: Snapshot) -> trainer_pb2.GetRunResponse:
    """Without the configuration and the last step."""
    return trainer_pb2.GetRunResponse(
        run_id=snapshot.run_id,
        state=_state(snapshot.state),
        step=snapshot.step,
        total_steps=snapshot.total_steps,
        weights_version=snapshot.weights_version,
        checkpoint_step=snapshot.checkpoint_step,
        error_message=snapshot.error_message,
    )


def _sample(row: Mapping[str, Any]) -> trainer_pb2.Sample:
    """A line of samples.jsonl."""
    return trainer_pb2.Sample(
        prompt_id=row["prompt_id"],
        prompt=row["prompt"],
        response=row["response"],
        # A line of a version that did not write them has none.
        tokens=row.get("response_tokens", ()),
        kl=row["kl"],
        rewards=row["rewards"],
        score=row["score"],
        finish_reason=row["finish_reason"],
    )


def _step_metrics(metrics: dict[str, float]) -> trainer_pb2.StepMetrics:
    return trainer_pb2.StepMetrics(
        step=int(metrics["step"]),
        weights_version=int(metrics["weights_version"]),
        step_s=metrics["step_s"],
        values={name: float(value) for name, value in metrics.items()},
    )
