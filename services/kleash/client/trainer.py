"""Client of a running PPO trainer: where it is, its steps as they end, pause, resume, stop."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

import grpc

from kleash.rpc.channel import connect
from kleash.rpc.credentials import Credentials
from kleash.rpc.errors import DeadlineExceeded, ServiceError, Unavailable, from_rpc_error
from kleash.trainer.v1 import trainer_pb2, trainer_pb2_grpc

SERVICE = "kleash.trainer.v1.TrainerService"
RECONNECT_WAIT_S = 0.5


class TrainerClient:
    """Talks to one trainer. Thread-safe; usable as a context manager."""

    def __init__(
        self, address: str, *, timeout_s: float = 600.0, credentials: Credentials | None = None
    ) -> None:
        """Args:
        address: "host:port", or a gRPC target such as "dns:///trainer:50051".
        timeout_s: deadline of a call.
        credentials: TLS and token; None takes those of the environment, KLEASH_TLS_* and
            KLEASH_TOKEN*.
        """
        self.address = address
        self._timeout_s = timeout_s
        self._channel = connect(
            address,
            service=SERVICE,
            methods_to_retry=("GetRun", "ListSamples"),
            credentials=credentials,
        )
        self._stub = trainer_pb2_grpc.TrainerServiceStub(self._channel)

    def get_run(self) -> trainer_pb2.GetRunResponse:
        """Where the run is."""
        return self._call(self._stub.GetRun, trainer_pb2.GetRunRequest())

    def watch_steps(self, from_step: int = 0) -> Iterator[trainer_pb2.StepMetrics]:
        """Yield the metrics of steps from ``from_step`` on (0: new steps only), as they end.

        Ends with the run. Goes on where it was, without a gap, when the server renews the
        connection or reaches its time limit for one call; raises Unavailable when the trainer
        cannot be reached again for a minute.
        """
        if from_step == 0:
            from_step = self.get_run().step + 1
        give_up = time.monotonic() + 60
        while True:
            try:
                request = trainer_pb2.WatchStepsRequest(from_step=from_step)
                for response in self._stub.WatchSteps(request):
                    yield response.metrics
                    from_step = response.metrics.step + 1
                    give_up = time.monotonic() + 60
                return
            except grpc.RpcError as rpc_error:
                error = from_rpc_error(rpc_error, address=self.address)
                if not _can_go_on(error) or time.monotonic() > give_up:
                    raise error from None
                if isinstance(error, DeadlineExceeded):
                    give_up = time.monotonic() + 60
            time.sleep(RECONNECT_WAIT_S)

    def watch_run(
        self, from_step: int = 0
    ) -> Generator[trainer_pb2.WatchStepsResponse, None, None]:
        """Yield the run, then steps as ``watch_steps`` and the run whenever it has changed.

        On one connection: raises ServiceError when that ends before the run does. Closing the
        generator ends the call.
        """
        request = trainer_pb2.WatchStepsRequest(from_step=from_step, include_run=True)
        call = self._stub.WatchSteps(request)
        try:
            yield from call
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.address) from None
        finally:
            call.cancel()

    def list_samples(self) -> trainer_pb2.ListSamplesResponse:
        """The newest responses that the run kept to be read, token by token."""
        return self._call(self._stub.ListSamples, trainer_pb2.ListSamplesRequest())

    def pause(self) -> trainer_pb2.PauseResponse:
        """Let the step in progress finish and then wait."""
        return self._call(self._stub.Pause, trainer_pb2.PauseRequest())

    def resume(self) -> trainer_pb2.ResumeResponse:
        """Go on after ``pause``."""
        return self._call(self._stub.Resume, trainer_pb2.ResumeRequest())

    def save_checkpoint(self) -> trainer_pb2.SaveCheckpointResponse:
        """Write a checkpoint after the step in progress; returns when it is on disk."""
        return self._call(self._stub.SaveCheckpoint, trainer_pb2.SaveCheckpointRequest())

    def stop(self) -> trainer_pb2.StopResponse:
        """End the run after the step in progress, with a checkpoint."""
        return self._call(self._stub.Stop, trainer_pb2.StopRequest())

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> TrainerClient:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.address) from None


def _can_go_on(error: ServiceError) -> bool:
    """Whether a broken watch may be taken up again."""
    return isinstance(error, DeadlineExceeded | Unavailable)
