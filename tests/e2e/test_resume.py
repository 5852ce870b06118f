"""Interrupted runs over gRPC: killed, stopped, steered, and with services that go away.

Whatever happens to a run in between, its losses are those of a run that nothing disturbed.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kleash.base.progress import NullProgress
from kleash.client import PreconditionFailed, TrainerClient, Unavailable
from kleash.ppo.config import PPOConfig
from kleash.ppo.report import PPOReport
from kleash.ppo.run import run
from kleash.ppo.services import Services
from kleash.ppo.train import train
from kleash.trainer.v1 import trainer_pb2
from kleash.up.supervisor import free_port

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.e2e

STEPS = 10
LONG = 1000
"""More steps than a test waits for."""


def ten_steps(cluster: Cluster, out: Path, **changes: Any) -> PPOConfig:
    return cluster.config(out, total_steps=STEPS, **changes)


@dataclass(frozen=True)
class Undisturbed:
    """Ten steps without an interruption."""

    out: Path
    report: PPOReport


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster, remote: Services, tmp_path_factory: pytest.TempPathFactory
) -> Undisturbed:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return Undisturbed(out, train(ten_steps(cluster, out), remote))


@pytest.fixture(scope="module")
def killed(cluster: Cluster, remote: Services, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ``kleash ppo`` process that was ended by SIGKILL in the middle of its run."""
    out = tmp_path_factory.mktemp("killed") / "run"
    trainer = cluster.trainer(ten_steps(cluster, out))
    trainer.wait_for_steps(5)
    trainer.end(signal.SIGKILL)
    assert 5 <= len(cluster.steps(out)) < STEPS
    return out


def test_a_killed_trainer_resumes_to_the_same_losses(
    cluster: Cluster, undisturbed: Undisturbed, killed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    trainer = cluster.trainer(ten_steps(cluster, out), "--resume")
    assert trainer.end() == 0, trainer.log.read_text()
    assert "going on from" in trainer.log.read_text()
    assert cluster.learned(out) == cluster.learned(undisturbed.out)
    report = json.loads((out / "report.json").read_text())
    assert report["digests"] == undisturbed.report.digests
    assert (
        json.loads((out / "run.json").read_text())["fence"]
        > json.loads((killed / "run.json").read_text())["fence"]
    )


def test_a_corrupt_newest_checkpoint_falls_back_to_the_one_before(
    cluster: Cluster,
    remote: Services,
    undisturbed: Undisturbed,
    killed: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    older, newest = sorted((out / "checkpoints").glob("step-*"))
    with (newest / "policy" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with caplog.at_level(logging.INFO):
        train(ten_steps(cluster, out, resume=True), remote)
    assert f"{newest.name} is damaged" in caplog.text
    assert f"going on from {older}" in caplog.text
    assert cluster.learned(out) == cluster.learned(undisturbed.out)


def test_sigterm_ends_a_run_with_a_checkpoint(
    cluster: Cluster, remote: Services, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = ten_steps(cluster, out, checkpoint={"every": LONG})
    trainer = cluster.trainer(config)
    trainer.wait_for_steps(3)
    assert trainer.end(signal.SIGTERM) == 128 + signal.SIGTERM, trainer.log.read_text()
    done = len(cluster.steps(out))
    assert 3 <= done < STEPS
    assert (out / "checkpoints" / f"step-{done:06d}" / "manifest.json").exists()
    assert not (out / "policy").exists()
    train(config.model_copy(update={"resume": True}), remote)
    assert cluster.learned(out) == cluster.learned(undisturbed.out)


def test_services_that_die_are_waited_for_and_the_policy_gets_its_weights_again(
    cluster: Cluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The policy comes back with the weights of its own start; nothing is drawn from those."""
    out = tmp_path / "run"
    trainer = cluster.trainer(ten_steps(cluster, out))
    trainer.wait_for_steps(2)
    for name in ("policy", "reward"):
        cluster.processes[name].kill()
        cluster.processes[name].start()
    assert trainer.process.poll() is None
    assert trainer.end() == 0, trainer.log.read_text()
    # A rollout in two parts is decoded in batches of another shape: equal up to rounding.
    for row, expected in zip(cluster.learned(out), cluster.learned(undisturbed.out), strict=True):
        assert row["response_length_mean"] == expected["response_length_mean"]
        assert row["policy_loss"] == pytest.approx(expected["policy_loss"], abs=1e-3)
        assert row["value_loss"] == pytest.approx(expected["value_loss"], abs=1e-3)


# ---------------------------------------------------------------------------- steering over gRPC


@dataclass
class Steered:
    """A long run in a thread of this process, and the client that steers it."""

    config: PPOConfig
    client: TrainerClient
    thread: threading.Thread
    reports: list[PPOReport]

    def wait_for(self, step: int) -> trainer_pb2.GetRunResponse:
        deadline = time.monotonic() + 60
        while (answer := self.client.get_run()).step < step:
            assert self.thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return answer


@pytest.fixture
def steered(cluster: Cluster, remote: Services, tmp_path: Path) -> Iterator[Steered]:
    port = free_port()
    config = cluster.config(
        tmp_path / "run", total_steps=LONG, checkpoint={"every": LONG}, server={"port": port}
    )
    reports: list[PPOReport] = []
    thread = threading.Thread(target=lambda: reports.append(run(config, NullProgress())))
    thread.start()
    with TrainerClient(f"127.0.0.1:{port}", timeout_s=60) as client:
        deadline = time.monotonic() + 60
        while True:
            try:
                client.get_run()
                break
            except Unavailable:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield Steered(config, client, thread, reports)
        if thread.is_alive():
            client.stop()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_run_is_watched_paused_saved_and_stopped(cluster: Cluster, steered: Steered) -> None:
    client, out = steered.client, steered.config.out
    seen = steered.wait_for(2)
    assert seen.state == trainer_pb2.RUN_STATE_RUNNING
    assert seen.total_steps == LONG
    assert json.loads(seen.config_json)["batch_size"] == 16
    assert seen.last_step.values["kl_coefficient"] > 0

    assert client.pause().state == trainer_pb2.RUN_STATE_PAUSED
    saved = client.save_checkpoint()
    paused = client.get_run()
    assert (paused.step, paused.checkpoint_step) == (saved.step, saved.step)
    assert Path(saved.path) == out / "checkpoints" / f"step-{saved.step:06d}"
    assert (Path(saved.path) / "manifest.json").exists()
    time.sleep(0.5)
    assert client.get_run().step == saved.step == len(cluster.steps(out))

    assert client.resume().state == trainer_pb2.RUN_STATE_RUNNING
    watched = []
    for step in client.watch_steps(from_step=1):
        watched.append(step)
        if step.step == saved.step + 2:
            client.stop()
    # The stream ended because the run did.
    rows = cluster.steps(out)
    assert [step.step for step in watched] == list(range(1, len(rows) + 1))
    assert [step.weights_version for step in watched] == list(range(2, len(rows) + 2))
    for step, row in zip(watched, rows, strict=True):
        assert step.values["policy_loss"] == row["policy_loss"]
        assert step.step_s == row["step_s"]
    steered.thread.join(timeout=60)
    (report,) = steered.reports
    assert (report.steps, report.is_complete) == (len(rows), False)
    assert (out / "checkpoints" / f"step-{len(rows):06d}" / "manifest.json").exists()


def test_a_second_trainer_takes_over_and_the_first_one_ends(
    cluster: Cluster, remote: Services, tmp_path: Path
) -> None:
    """A trainer that was believed dead must not overwrite the weights of its successor."""
    first = cluster.trainer(cluster.config(tmp_path / "first", total_steps=LONG))
    first.wait_for_steps(1)
    train(cluster.config(tmp_path / "second", total_steps=1), remote)
    assert first.end() == 3
    assert "another trainer" in first.log.read_text()


def test_a_service_that_is_down_is_one_clear_sentence(cluster: Cluster, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    config = cluster.config(
        tmp_path / "run", services={**cluster.addresses(), "reward": address, "wait_s": 1}
    )
    trainer = cluster.trainer(config)
    assert trainer.end() == 3
    (sentence,) = [
        line for line in trainer.log.read_text().splitlines() if line.startswith("error: ")
    ]
    assert f"the reward service at {address} did not answer within 1 s" in sentence
    assert "start it with: kleash serve reward" in sentence
    assert not config.out.exists()


def test_steering_a_run_that_is_over_is_refused(cluster: Cluster, remote: Services) -> None:
    """The door closes with the run; what is asked after its last step is refused, not lost."""
    from kleash.ppo.control import Control, RunState
    from kleash.ppo.service import TrainerService
    from kleash.rpc.server import BackgroundServer

    control = Control()
    with (
        BackgroundServer([TrainerService(control)]) as server,
        TrainerClient(server.address, timeout_s=30) as client,
    ):
        assert client.get_run().state == trainer_pb2.RUN_STATE_STARTING
        control.end(RunState.FAILED, "the disk is full.")
        failed = client.get_run()
        assert failed.state == trainer_pb2.RUN_STATE_FAILED
        assert failed.error_message == "the disk is full."
        with pytest.raises(PreconditionFailed, match="the run is over"):
            client.save_checkpoint()
        assert list(client.watch_steps(from_step=1)) == []
