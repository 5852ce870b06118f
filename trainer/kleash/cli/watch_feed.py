"""What a trainer tells, over connections that end and begin again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kleash.client.trainer import TrainerClient
from kleash.rpc.errors import DeadlineExceeded, ServiceError, Unavailable
from kleash.trainer.v1 import trainer_pb2

RETRY_S = 1.0
OVER = (
    trainer_pb2.RUN_STATE_STOPPING,
    trainer_pb2.RUN_STATE_COMPLETED,
    trainer_pb2.RUN_STATE_FAILED,
)
"""States with which a stream may end for good."""


@dataclass(frozen=True)
class Lost:
    """The trainer does not answer; it is asked again and again."""

    error: ServiceError


@dataclass(frozen=True)
class Back:
    """It answers again."""


@dataclass(frozen=True)
class StartedAgain:
    """Another trainer goes on with the run after ``step``: what came later is done again."""

    step: int


News = trainer_pb2.GetRunResponse | trainer_pb2.StepMetrics | Lost | Back | StartedAgain


def follow(
    client: TrainerClient,
    *,
    from_step: int,
    wait_s: float,
    check: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[News]:
    """The run, and its steps from ``from_step`` on, until the run is over.

    Each step comes once, or again after StartedAgain. ``check`` gets the id of the run and raises
    for one that is not wanted. Raises ServiceError at once for a trainer that refuses, and after
    ``wait_s`` seconds for one that has gone away.
    """
    newest, lost_at, run = from_step - 1, None, trainer_pb2.GetRunResponse()
    while True:
        try:
            is_behind = False
            with contextlib.closing(client.watch_run(newest + 1)) as stream:
                for response in stream:
                    if lost_at is not None:
                        lost_at = None
                        yield Back()
                    if not response.HasField("run"):
                        newest = response.metrics.step
                        yield response.metrics
                        continue
                    run = response.run
                    check(run.run_id)
                    # One that still loads does not know yet where its run is.
                    is_behind = bool(run.total_steps) and run.step < newest
                    if is_behind:
                        newest = run.step
                        yield StartedAgain(newest)
                    yield run
                    if is_behind:
                        break
            if is_behind:
                continue
            if run.state in OVER:
                return
            raise Unavailable("the trainer has ended the connection.", reason="ENDED")
        except (Unavailable, DeadlineExceeded) as error:
            if isinstance(error, DeadlineExceeded) and error.reason == "SERVER_TIME_LIMIT":
                continue
            now = time.monotonic()
            if lost_at is None:
                lost_at = now
                yield Lost(error)
            if now - lost_at > wait_s:
                raise
        sleep(RETRY_S)
