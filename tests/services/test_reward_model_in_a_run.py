"""A PPO run whose reward service gets another model: real servers, real LoadModel calls."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.conftest import World, world  # noqa: F401  (a fixture)

from kleash.client.reward import RewardClient
from kleash.client.reward_admin import RewardAdminClient
from kleash.lm.heads import Normalization, reward_model_from_causal_lm
from kleash.lm.load import load_tokenizer, save_checkpoint_folder
from kleash.ppo import checkpoint
from kleash.ppo.calibration import Calibration
from kleash.ppo.config import PPOConfig
from kleash.ppo.control import Control
from kleash.ppo.pinning import RewardModelError
from kleash.ppo.services import Services
from kleash.ppo.train import train
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

ADOPT = {"new_reward_model": "adopt"}
AFFINE = {"new_reward_model": "adopt", "calibration": "affine", "calibration_samples": 20}


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reward model; one that nearly agrees with it in other units; one of its own mind."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(tiny_folder)
    for name, seed, scale in (("first", 1, 1.0), ("similar", 1, 3.0), ("other", 5, 1.0)):
        model = reward_model_from_causal_lm(tiny_folder, seed=seed)
        noise = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            model.score.weight.mul_(scale).add_(noise, alpha=0.02 * (scale - 1))
        Normalization(0.25, 2.0 / scale).store(model.config)
        save_checkpoint_folder(model, tokenizer, root / name, {"stage": "reward-model"})
    return {path.name: path for path in root.iterdir()}


@dataclass
class Replica:
    """A reward server that starts with the first model."""

    folders: dict[str, Path]
    address: str
    admin: RewardAdminClient
    revisions: dict[str, str] = field(default_factory=dict)

    def load(self, name: str) -> None:
        answer = self.admin.load_model(str(self.folders[name]))
        self.revisions[name] = answer.model.revision

    def unload(self, name: str) -> None:
        self.admin.unload_revision(self.revisions[name])


@contextlib.contextmanager
def served(folders: dict[str, Path]) -> Iterator[Replica]:
    config = {
        "model": folders["first"],
        "admins": ["*"],
        "model_folders": [folders["first"].parent],
    }
    service = RewardService(RewardConfig.model_validate(config))
    with (
        BackgroundServer([service], ServerConfig()) as server,
        RewardAdminClient(server.address) as admin,
        RewardClient(server.address) as client,
    ):
        first = client.get_model().model.revision
        yield Replica(folders, server.address, admin, {"first": first})


@pytest.fixture
def replica(folders: dict[str, Path]) -> Iterator[Replica]:
    with served(folders) as replica:
        yield replica


def at_step(control: Control, orders: dict[int, Callable[[], None]]) -> None:
    """Give each order once, when the run has done so many steps."""

    def steer() -> None:
        order = orders.pop(control.snapshot.step, None)
        if order is not None:
            order()

    control.add_listener(steer)


@contextlib.contextmanager
def services_of(world: World, address: str) -> Iterator[Services]:  # noqa: F811
    with RewardClient(address) as reward:
        yield replace(world.services(), reward=reward)


def four_steps(world: World, replica: Replica, out: Path, **services: Any) -> PPOConfig:  # noqa: F811
    return world.config(
        out,
        reward_model=replica.folders["first"],
        total_steps=4,
        samples={"per_step": 12},
        checkpoint={"every": 1, "keep": 9},
        services=services,
    )


def after(step: int, action: Callable[[], None]) -> Control:
    """Once a step is done."""
    control = Control()
    at_step(control, {step: action})
    return control


@dataclass
class Interrupted:
    """A policy; ``action`` runs in the middle of its answer to a call, counted from 1."""

    policy: Any
    call: int
    action: Callable[[], None]
    num_calls: int = 0

    def get_policy(self) -> Any:
        return self.policy.get_policy()

    def generate(self, prompts: Sequence[Any], *arguments: Any, **options: Any) -> Generator[Any]:
        self.num_calls += 1
        for count, generated in enumerate(self.policy.generate(prompts, *arguments, **options)):
            if self.num_calls == self.call and count == 9:  # two groups of four were sent
                self.action()
            yield generated


def models_of_steps(out: Path, replica: Replica) -> list[str]:
    """Name of the one model that scored each step."""
    names = {revision: name for name, revision in replica.revisions.items()}
    by_step: dict[int, set[str]] = {}
    for line in (out / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        sample = json.loads(line)
        by_step.setdefault(sample["step"], set()).add(names[sample["reward_revision"]])
    assert all(len(models) == 1 for models in by_step.values()), by_step
    return [models.pop() for _, models in sorted(by_step.items())]


def test_a_run_that_refuses_goes_on_until_its_model_is_given_back(
    world: World,  # noqa: F811
    replica: Replica,
    tmp_path: Path,
) -> None:
    """LoadModel after step 1, UnloadRevision after step 3."""
    out, control = tmp_path / "run", Control()

    at_step(control, {1: lambda: replica.load("similar"), 3: lambda: replica.unload("first")})
    config = four_steps(world, replica, out)
    with services_of(world, replica.address) as services:
        with pytest.raises(RewardModelError, match=r"and no longer sha256:.*=adopt"):
            train(config, services, control=control)
        assert models_of_steps(out, replica) == ["first"] * 3
        plain = tmp_path / "plain"
        replica.load("first")
        train(four_steps(world, replica, plain), services)
        assert world.learned(out) == world.learned(plain)[:3], "the new one changed no bit"
        report = train(config.model_copy(update={"resume": True}), services)
    assert report.is_complete
    assert models_of_steps(out, replica) == ["first"] * 4
    assert world.learned(out) == world.learned(plain)


def test_a_run_that_adopts_goes_on_with_the_new_model(
    world: World,  # noqa: F811
    replica: Replica,
    tmp_path: Path,
) -> None:
    """Loaded in the middle of step 2, which ends on the model that it began with."""
    out = tmp_path / "run"
    with services_of(world, replica.address) as services:
        policy = Interrupted(services.policies[0], 2, lambda: replica.load("other"))
        interrupted = replace(services, policies={0: policy})
        report = train(four_steps(world, replica, out, **ADOPT), interrupted)
    assert models_of_steps(out, replica) == ["first", "first", "other", "other"]
    assert report.digests["reward_model"] == replica.revisions["other"]


def test_a_model_that_is_given_back_in_a_step_scores_none_of_it(
    world: World,  # noqa: F811
    replica: Replica,
    tmp_path: Path,
) -> None:
    """Two groups of step 2 have its scores already: the whole step is scored by the new one."""
    out = tmp_path / "run"

    def replace_model() -> None:
        replica.load("other")
        replica.unload("first")

    with services_of(world, replica.address) as services:
        policy = Interrupted(services.policies[0], 2, replace_model)
        interrupted = replace(services, policies={0: policy})
        train(four_steps(world, replica, out, **ADOPT), interrupted)
    assert models_of_steps(out, replica) == ["first", "other", "other", "other"]


def test_two_replicas_are_switched_one_after_the_other(
    world: World,  # noqa: F811
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    """While they differ, each step is scored by one model, whichever replica a call meets."""
    out, control = tmp_path / "run", Control()
    with served(folders) as one, served(folders) as two:

        def replace_one() -> None:
            one.load("other")
            one.unload("first")

        at_step(control, {1: replace_one, 3: lambda: two.load("other")})
        address = f"ipv4:///{one.address},{two.address}"
        with services_of(world, address) as services:
            report = train(four_steps(world, one, out, **ADOPT), services, control=control)
        assert models_of_steps(out, one) == ["first", "first", "first", "other"]
        assert report.digests["reward_model"] == one.revisions["other"]


def test_calibrated_scores_have_the_mean_and_deviation_of_the_old_ones(
    world: World,  # noqa: F811
    replica: Replica,
    tmp_path: Path,
) -> None:
    """On the probe set of the checkpoint before; and a run that is resumed there has each bit."""
    out = tmp_path / "run"
    with services_of(world, replica.address) as services:
        config = four_steps(world, replica, out, **AFFINE)
        control = after(2, lambda: replica.load("similar"))
        whole = train(config, services, control=control)
        assert models_of_steps(out, replica) == ["first", "first", "similar", "similar"]

        cut = tmp_path / "cut"
        shutil.copytree(out, cut)
        shutil.rmtree(cut / "policy")
        for step in (3, 4):
            shutil.rmtree(cut / f"checkpoints/step-{step:06d}")
        before = checkpoint.newest(cut / "checkpoints")
        after_it = checkpoint.newest(out / "checkpoints")
        assert before is not None
        assert after_it is not None
        calibration = after_it.reward.calibration
        assert calibration != Calibration()
        raw = services.reward.pinned(replica.revisions["similar"]).score_tokens(
            [probe.sequence for probe in before.reward.probes],
            tokenizer_sha256=whole.digests["tokenizer"],
        )
        new = np.array([calibration.apply(score.score) for score in raw])
        old = np.array([probe.score for probe in before.reward.probes])
        assert (new.mean(), new.std()) == pytest.approx((old.mean(), old.std()), rel=1e-5)
        assert np.abs(new - old).max() > 1e-3, "it is not the old model in other units"

        rest = train(config.model_copy(update={"out": cut, "resume": True}), services)
    assert rest.digests == whole.digests
    assert world.learned(cut) == world.learned(out)
    assert (cut / "samples.jsonl").read_bytes() == (out / "samples.jsonl").read_bytes()
    assert json.loads((cut / "policy/kleash.json").read_text())["reward_calibration"] == {
        "scale": calibration.scale,
        "shift": calibration.shift,
    }
