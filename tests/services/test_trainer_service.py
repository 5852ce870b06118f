"""The trainer's own service over a real Control: what watchers and callers of a run are told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kleash.client import TrainerClient
from kleash.ppo.control import Control, RunState, Snapshot
from kleash.ppo.service import TrainerService
from kleash.rpc.server import BackgroundServer
from kleash.trainer.v1 import trainer_pb2

pytestmark = pytest.mark.services


def step_of(step: int) -> dict[str, float]:
    return {"step": step, "weights_version": step + 1, "step_s": 0.5, "score_mean": step / 4}


@pytest.fixture
def control() -> Control:
    """A run that was resumed after step 2 and has done step 3."""
    control = Control()
    control.begin(Snapshot(run_id="a-run", step=2, total_steps=9), [step_of(1), step_of(2)])
    control.step_done(step_of(3))
    return control


@pytest.fixture
def client(control: Control) -> Iterator[TrainerClient]:
    with (
        BackgroundServer([TrainerService(control)]) as server,
        TrainerClient(server.address, timeout_s=10) as client,
    ):
        yield client


def test_a_run_is_described(client: TrainerClient) -> None:
    run = client.get_run()
    assert (run.run_id, run.step, run.total_steps, run.weights_version) == ("a-run", 3, 9, 4)
    assert run.last_step.values["score_mean"] == 0.75


def test_watchers_get_the_steps_they_ask_for(control: Control, client: TrainerClient) -> None:
    """From step 2 on, the one that a checkpoint brought back included; then the end of the run."""
    watched = client.watch_steps(from_step=2)
    seen = [next(watched), next(watched)]
    control.step_done(step_of(4))
    seen.append(next(watched))
    assert [step.step for step in seen] == [2, 3, 4]
    assert [step.weights_version for step in seen] == [3, 4, 5]
    control.end(RunState.COMPLETED)
    assert list(watched) == []
    assert client.get_run().state == trainer_pb2.RUN_STATE_COMPLETED


def test_a_watch_of_steps_to_come_leaves_out_those_before(
    control: Control, client: TrainerClient
) -> None:
    watched = client.watch_steps(from_step=5)
    for step in (4, 5):
        control.step_done(step_of(step))
    assert next(watched).step == 5
