"""``kleash k8s check``, which ``helm test`` runs: real services on loopback, well and unwell."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tests.services.doubler import eventually, free_port, health_of

from kleash.cli.main import main
from kleash.client import policy
from kleash.cluster import check as checking
from kleash.cluster.check import CheckConfig, Outcome, check
from kleash.common.v1 import common_pb2
from kleash.lm.digest import model_digest
from kleash.lm.load import load_causal_lm, load_sequence_classifier
from kleash.policy.config import PolicyConfig
from kleash.policy.service import PolicyService
from kleash.ppo.control import Control, RunState, Snapshot
from kleash.ppo.service import TrainerService
from kleash.reference.config import ReferenceConfig
from kleash.reference.service import ReferenceService
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a command's set-up of logging ends with its test."""
    monkeypatch.setattr(checking, "TRY_AGAIN_S", 0.1)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)


@pytest.fixture(scope="module")
def address(tiny_folder: Path, tiny_reward_folder: Path) -> Iterator[str]:
    """The packed profile: all three in one server."""
    services = [
        PolicyService(PolicyConfig(model=tiny_folder)),
        RewardService(RewardConfig(model=tiny_reward_folder, name="judge")),
        ReferenceService(ReferenceConfig(model=tiny_folder)),
    ]
    with BackgroundServer(services) as server:
        yield server.address


@pytest.fixture
def control() -> Control:
    control = Control()
    running = RunState.RUNNING
    control.begin(Snapshot("a-run", running, step=2, total_steps=9, weights_version=3), [])
    return control


@pytest.fixture
def trainer(control: Control) -> Iterator[str]:
    with BackgroundServer([TrainerService(control)]) as server:
        yield server.address


def outcomes(**keys: Any) -> list[Outcome]:
    told: list[Outcome] = []
    is_well = check(CheckConfig(**keys), told.append)
    assert is_well == all(outcome.is_ok for outcome in told)
    return told


def test_a_line_a_check(
    address: str,
    trainer: str,
    tiny_folder: Path,
    tiny_reward_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [f"--{name}={address}" for name in ("policy", "reward", "reference")]
    assert main(["k8s", "check", *flags, f"--trainer={trainer}", "--timeout_s=20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    revision = model_digest(load_sequence_classifier(tiny_reward_folder))
    reference = model_digest(load_causal_lm(tiny_folder))
    assert [line.partition(":")[0] for line in lines] == [
        "ok reward health", "ok reward", "ok reference health", "ok reference",
        "ok policy health", "ok policy", "ok trainer health", "ok trainer",
    ]  # fmt: skip
    assert lines[0] == f"ok reward health: kleash.reward.v1.RewardService at {address} is SERVING"
    assert lines[1].startswith("ok reward: score ")
    assert lines[1].endswith(f" by judge (revision {revision})")
    float(lines[1].split()[3])
    assert lines[3].startswith("ok reference: 4 log-probs, mean -")
    assert lines[3].endswith(f"by {tiny_folder.name} (revision {reference})")
    assert lines[5] == f"ok policy: 4 tokens with weights version 0 of {tiny_folder.name}"
    assert lines[7] == "ok trainer: run a-run is RUNNING at step 2 of 9, weights version 3"


def test_only_what_is_named_is_asked(address: str) -> None:
    assert [each.name for each in outcomes(reward=address)] == ["reward health", "reward"]
    with pytest.raises(ValueError, match="name a service: --policy, --reward"):
        CheckConfig()


def test_a_service_that_comes_up_is_waited_for(tiny_reward_folder: Path) -> None:
    port = free_port()
    service = RewardService(RewardConfig(model=tiny_reward_folder))
    told: list[Outcome] = []
    config = CheckConfig(reward=f"127.0.0.1:{port}", timeout_s=60)
    waiting = threading.Thread(target=check, args=(config, told.append))
    waiting.start()
    time.sleep(1)
    assert told == []
    with BackgroundServer([service], ServerConfig(port=port)):
        waiting.join(60)
    assert [outcome.is_ok for outcome in told] == [True, True]


def test_nobody_there(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    status = main(
        ["k8s", "check", f"--reward={nowhere}", f"--reference={address}", "--timeout_s=1"]
    )
    assert status == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(f"failed reward health: cannot reach the service at {nowhere}: ")
    assert [line.partition(":")[0] for line in rest] == ["ok reference health", "ok reference"]


def test_the_wrong_service_fails_at_once(address: str) -> None:
    started = time.monotonic()
    (outcome,) = outcomes(trainer=address, timeout_s=60)
    assert str(outcome) == (
        f"failed trainer health: the server at {address} does not host "
        "kleash.trainer.v1.TrainerService; correct --trainer."
    )
    assert time.monotonic() - started < 30


def test_a_service_that_is_not_ready_is_not_well(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy replica without the version that its trainer requires."""
    service = PolicyService(PolicyConfig(model=tiny_folder))
    with BackgroundServer([service]) as server:
        assert service.is_ready(policy.SERVICE)
        monkeypatch.setattr(service, "is_ready", lambda full_name: full_name != policy.SERVICE)
        eventually(lambda: health_of(server.address, policy.SERVICE) == "NOT_SERVING")
        (outcome,) = outcomes(policy=server.address, timeout_s=1)
    assert str(outcome) == (
        f"failed policy health: kleash.policy.v1.PolicyService at {server.address} is NOT_SERVING; "
        "the log of its pod says what it waits for."
    )


def test_a_run_that_failed(control: Control, trainer: str) -> None:
    control.end(RunState.FAILED, "the reward service went away.")
    *_, last = outcomes(trainer=trainer, timeout_s=1)
    assert str(last) == (
        "failed trainer: the run a-run failed: the reward service went away; correct that and "
        "start the trainer again, which goes on from its checkpoint."
    )


class Confused(reward_pb2_grpc.RewardServiceServicer):
    """Says one revision and scores with another, as two replicas do in the middle of a roll-out."""

    def __init__(self, told: str, scored: str, score: float = 0.5) -> None:
        self.told, self.scored, self.score = told, scored, score
        self.num_scored = 0

    def GetModel(self, request: Any, context: Any) -> reward_pb2.GetModelResponse:
        return reward_pb2.GetModelResponse(
            model=common_pb2.ServedModel(name="judge", revision=self.told),
            limits=common_pb2.Limits(
                max_items=8, max_item_tokens=100, max_queued_tokens=1000, max_message_bytes=10**6
            ),
        )

    def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        assert request.items[0].WhichOneof("input") == "text"  # it has no chat template
        self.num_scored += 1
        result = reward_pb2.ScoreResult(
            code=common_pb2.ITEM_STATUS_CODE_OK, score=self.score, token_count=3
        )
        model = common_pb2.ServedModel(name="judge", revision=self.scored)
        return reward_pb2.ScoreResponse(model=model, results=[result])


@pytest.fixture
def confused() -> Iterator[tuple[str, Confused]]:
    servicer = Confused("sha256:old", "sha256:new")
    server = grpc.server(futures.ThreadPoolExecutor(4))
    board = health.HealthServicer()
    board.set("kleash.reward.v1.RewardService", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(board, server)
    reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", servicer
    server.stop(None).wait()


def test_a_roll_out_is_waited_for(confused: tuple[str, Confused]) -> None:
    address, servicer = confused
    *_, last = outcomes(reward=address, timeout_s=1)
    assert str(last) == (
        "failed reward: GetModel names the revision sha256:old, and the score is of sha256:new: "
        "a roll-out is under way."
    )
    assert servicer.num_scored > 2
    servicer.told = "sha256:new"
    *_, last = outcomes(reward=address, timeout_s=5)
    assert str(last) == (
        "ok reward: score 0.500 of plain text, for the model has no chat template by judge "
        "(revision sha256:new)"
    )


def test_a_service_that_names_no_model(confused: tuple[str, Confused]) -> None:
    address, servicer = confused
    servicer.told = ""
    *_, last = outcomes(reward=address, timeout_s=1)
    assert str(last).startswith(f"failed reward: the service at {address} names its model '")


def test_a_score_that_is_no_number(confused: tuple[str, Confused]) -> None:
    address, servicer = confused
    servicer.told, servicer.score = "sha256:new", float("nan")
    *_, last = outcomes(reward=address, timeout_s=1)
    assert not last.is_ok
    assert "nan" in last.text


def test_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k8s", "--help"]) == 0
    printed = capsys.readouterr().out
    for name in ("check", "run", "status", "logs", "pause", "resume", "cancel"):
        assert f"\n  {name} " in printed
    assert main(["k8s", "chekc"]) == 2
    assert "kleash k8s does one of check, run, status" in capsys.readouterr().err
    assert main(["k8s", "check"]) == 2
    assert "name a service" in capsys.readouterr().err
