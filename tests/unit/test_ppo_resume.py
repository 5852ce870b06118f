"""Runs that were stopped, killed or cut in two go on as if nothing had been (facts/ppo.md P21)."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kleash.base.errors import ConfigError
from kleash.lm.digest import model_digest
from kleash.lm.load import load_causal_lm
from kleash.ppo.config import PPOConfig
from kleash.ppo.control import Control, RunState
from kleash.ppo.lease import NoLease
from kleash.ppo.report import PPOReport
from kleash.ppo.services import Services
from kleash.ppo.session import open_session
from kleash.ppo.train import train

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Whole:
    """A run of four steps that nothing disturbed."""

    out: Path
    report: PPOReport
    services: Services


def four_steps(world: World, out: Path) -> PPOConfig:
    return world.config(
        out,
        total_steps=4,
        checkpoint={"every": 1, "keep": 2},
        kl={"coefficient": 0.2},
        evaluation={"prompts": str(world.prompts), "every": 2, "num_prompts": 3},
    )


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out, services = tmp_path_factory.mktemp("runs") / "whole", world.services()
    return Whole(out, train(four_steps(world, out), services), services)


def test_a_run_cut_in_two_equals_one_run(world: World, whole: Whole, tmp_path: Path) -> None:
    """P21, through the whole trainer: models, optimizers, prompts, seeds, versions, metrics."""
    out, control = tmp_path / "cut", Control()
    config = four_steps(world, out)
    stop_after(control, 2)
    half = train(config, world.services(), control=control)
    assert (half.steps, half.is_complete) == (2, False)
    assert not (out / "policy").exists()
    # A trainer that died left rows beyond its checkpoint, the last one half written.
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "step_s": 1.0}\n{"step": 4, "sco')
    rest = train(resumed(config), world.services())

    assert world.learned(out) == world.learned(whole.out)
    assert rest.digests == whole.report.digests
    assert rest.run_id == half.run_id
    assert rest.evaluation_last == whole.report.evaluation_last
    assert [row["step"] for row in rows(out)] == [0, 1, 2, 2, 3, 4, 4]
    assert json.loads((out / "run.json").read_text())["fence"] == 2


def test_resuming_a_finished_run_changes_nothing(
    world: World, whole: Whole, tmp_path: Path
) -> None:
    shutil.copytree(whole.out, tmp_path / "run")
    again = train(resumed(four_steps(world, tmp_path / "run")), world.services())
    assert again.digests == whole.report.digests
    assert rows(tmp_path / "run") == rows(whole.out)


def test_a_resumed_run_takes_over_a_policy_service_that_is_ahead(
    world: World, whole: Whole, tmp_path: Path
) -> None:
    """The dead trainer published further than its last checkpoint; a greater fence goes back."""
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    shutil.rmtree(out / "checkpoints" / "step-000004")
    shutil.rmtree(out / "policy")
    before = whole.services.weights[0].get_weights()
    assert (before.version, before.fence) == (5, 1)
    rest = train(resumed(four_steps(world, out)), whole.services)
    assert rest.digests == whole.report.digests
    assert world.learned(out) == world.learned(whole.out)
    after = whole.services.weights[0].get_weights()
    assert (after.version, after.fence, after.digest) == (5, 2, before.digest)


def test_a_run_without_its_checkpoints_replaces_the_old_policy(
    world: World, whole: Whole, tmp_path: Path
) -> None:
    """It starts again, with another seed even: policy/ must be what report.json describes."""
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    shutil.rmtree(out / "checkpoints")
    config = four_steps(world, out).model_copy(update={"seed": 3})
    again = train(resumed(config), world.services())
    assert again.digests["policy"] != whole.report.digests["policy"]
    assert model_digest(load_causal_lm(out / "policy")) == again.digests["policy"]


def test_another_chat_template_is_refused(world: World, tmp_path: Path) -> None:
    """It would make other prompts of the same file."""
    prompts, template = tmp_path / "prompts.jsonl", tmp_path / "template.jinja"
    prompts.write_text('{"prompt": [{"role": "user", "content": "hello"}]}\n')
    template.write_text("{{ messages[0].content }}|")
    changes = {"prompts": str(prompts), "chat_template": template, "total_steps": 1}
    config, services = world.config(tmp_path / "run", **changes), world.services()
    train(config, services)
    template.write_text("{{ messages[0].content }}!!")
    with pytest.raises(ConfigError, match=r"the chat template \(.*\) is not the one that the run"):
        train(resumed(config), services)


def test_a_step_is_saved_once(world: World, tmp_path: Path) -> None:
    """The checkpoint that is there is never taken away to make room for the same one."""
    config = world.config(tmp_path / "run")
    with open_session(config, world.services(), Control(), NoLease()) as run:
        first = run.save()
        manifest = (first.path / "manifest.json").stat()
        assert run.save() == first
        assert (first.path / "manifest.json").stat().st_ino == manifest.st_ino


def resumed(config: PPOConfig) -> PPOConfig:
    return config.model_copy(update={"resume": True})


def stop_after(control: Control, step: int) -> None:
    """Ask the run to stop once ``step`` is done."""

    def listener() -> None:
        if control.snapshot.step == step:
            control.stop()

    control.add_listener(listener)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_an_abandoned_rollout_leaves_the_run_as_it_was(
    world: World, whole: Whole, tmp_path: Path
) -> None:
    """SIGTERM in the middle of generation: the checkpoint is that of the step before."""
    out, services, control = tmp_path / "run", world.services(), Control()

    class Stopping:
        """A policy that has the run told to stop while it answers the second step."""

        calls = 0

        def get_policy(self) -> Any:
            return services.policies[0].get_policy()

        def generate(self, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == 3:  # the first call is the evaluation's
                control.stop(abandon_rollout=True)
            return services.policies[0].generate(*arguments, **options)

    stopping = replace(services, policies={0: Stopping()})
    report = train(four_steps(world, out), stopping, control=control)
    assert (report.steps, report.is_complete) == (1, False)
    assert control.snapshot.state is RunState.STOPPING
    assert control.snapshot.checkpoint_step == 1
    rest = train(resumed(four_steps(world, out)), services)
    assert world.learned(out) == world.learned(whole.out)
    assert rest.digests == whole.report.digests
