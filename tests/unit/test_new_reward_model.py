"""A reward model that is replaced in a run: refused, or adopted when a step begins."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.conftest import World
from tests.unit.reward_fleet import Fleet
from tests.unit.test_ppo_resume import stop_after

from kleash.base.errors import ConfigError
from kleash.data.prompts import PromptRecord, load_prompts
from kleash.lm.load import load_tokenizer
from kleash.ppo.control import Control
from kleash.ppo.pinning import NUM_ASKED, RewardModelError
from kleash.ppo.rollout import Rollout, RolloutError
from kleash.ppo.train import train
from kleash.rpc.errors import NotFound

pytestmark = pytest.mark.unit

NEW = "sha256:new"
ADOPT = {"new_reward_model": "adopt"}


@pytest.fixture
def old(world: World) -> str:
    return world.reward.get_model().model.revision


@pytest.fixture
def prompts(world: World) -> list[PromptRecord]:
    records = load_prompts(str(world.prompts), load_tokenizer(world.model), max_tokens=40)
    return list(records) * 2


def fleet(world: World, *replicas: list[str]) -> Fleet:
    """The new model gives every response the score 10."""
    return Fleet(world.reward, list(replicas), {NEW: lambda _: 10.0})


def collector(world: World, tmp_path: Path, reward: Fleet, **services: Any) -> Any:
    config = world.config(tmp_path, services=services)
    return world.collector(replace(world.services(), reward=reward), config)


def revisions_of(rollout: Rollout) -> set[str]:
    assert {sample.score == 10.0 for sample in rollout.samples} == {rollout.reward.revision == NEW}
    assert {sample.reward_revision for sample in rollout.samples} == {rollout.reward.revision}
    return {rollout.reward.revision}


# ------------------------------------------------------------------------------------ one service


def test_a_run_that_refuses_keeps_to_a_model_that_is_still_held(
    world: World,
    tmp_path: Path,
    prompts: list[PromptRecord],
    old: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reward = fleet(world, [NEW, old])
    refusing = collector(world, tmp_path, reward)
    with caplog.at_level(logging.WARNING):
        for seed in (7, 8):
            rollout = refusing.collect(prompts, seed=seed, weights_version=0)
            assert revisions_of(rollout) == {old}
    assert reward.scored == [old] * 6
    told = [record.message for record in caplog.records if "as long as" in record.message]
    assert len(told) == 1, "said once, not every step"
    assert NEW in told[0]
    assert old in told[0]


def test_a_run_that_refuses_ends_when_its_model_is_given_back(
    world: World, tmp_path: Path, prompts: list[PromptRecord], old: str
) -> None:
    refusing = collector(world, tmp_path, fleet(world, [NEW]))
    sentence = f"serves {NEW} and no longer {old}, with which.*services.new_reward_model=adopt"
    with pytest.raises(RewardModelError, match=sentence):
        refusing.collect(prompts, seed=7, weights_version=0)


def test_a_new_model_is_adopted_when_a_step_begins(
    world: World, tmp_path: Path, prompts: list[PromptRecord], old: str
) -> None:
    """Though the old one is held: every call of the step names the new one."""
    reward = fleet(world, [NEW, old])
    rollout = collector(world, tmp_path, reward, **ADOPT).collect(
        prompts, seed=7, weights_version=0
    )
    assert revisions_of(rollout) == {NEW}
    assert reward.scored == [NEW] * 3


def test_a_model_that_comes_in_the_middle_of_a_step_waits_for_its_end(
    world: World, tmp_path: Path, prompts: list[PromptRecord], old: str
) -> None:
    reward = fleet(world, [old])

    def switch() -> None:
        reward.replicas = [[NEW, old]]

    adopting = collector(world, tmp_path, reward, **ADOPT)
    reward.before_score = switch
    assert revisions_of(adopting.collect(prompts, seed=7, weights_version=0)) == {old}
    assert reward.scored == [old] * 3
    assert revisions_of(adopting.collect(prompts, seed=8, weights_version=0)) == {NEW}


def test_an_evaluation_keeps_to_the_model_of_the_step_before(
    world: World, tmp_path: Path, prompts: list[PromptRecord], old: str
) -> None:
    reward = fleet(world, [NEW, old])
    adopting = collector(world, tmp_path, reward, **ADOPT)
    call: dict[str, Any] = {"seed": 7, "weights_version": 0, "begins_step": False}
    assert revisions_of(adopting.collect(prompts, **call)) == {old}
    reward.replicas = [[NEW]]
    assert revisions_of(adopting.collect(prompts, **call)) == {NEW}


def test_a_step_whose_model_is_given_back_is_scored_again_by_the_new_one(
    world: World, tmp_path: Path, prompts: list[PromptRecord], old: str
) -> None:
    """The first group of three had its scores already."""
    reward = fleet(world, [old])

    def give_back() -> None:
        if reward.scored:
            reward.replicas = [[NEW]]

    reward.before_score = give_back
    rollout = collector(world, tmp_path, reward, **ADOPT).collect(
        prompts, seed=7, weights_version=0
    )
    assert revisions_of(rollout) == {NEW}
    assert reward.scored == [old, NEW, NEW, NEW]


def test_a_model_for_other_tokens_is_not_adopted(
    world: World, tmp_path: Path, prompts: list[PromptRecord], old: str
) -> None:
    reward = fleet(world, [NEW, old])
    reward.tokenizer_sha256 = "ab" * 32
    adopting = collector(world, tmp_path, reward, **ADOPT)
    with pytest.raises(RewardModelError, match="has another tokenizer \\(abababababab\\)"):
        adopting.collect(prompts, seed=7, weights_version=0)
    assert not reward.scored


# -------------------------------------------------------------------- replicas behind a round robin


def test_while_replicas_of_both_answer_a_step_keeps_to_its_model(
    world: World, tmp_path: Path, prompts: list[PromptRecord], old: str
) -> None:
    """Every second call meets a replica without it, and is made again."""
    reward = fleet(world, [NEW], [old])
    adopting = collector(world, tmp_path, reward, **ADOPT)
    for seed in (7, 8):
        rollout = adopting.collect(prompts, seed=seed, weights_version=0)
        assert revisions_of(rollout) == {old}
    assert reward.scored == [old] * 6
    assert reward.num_refused, "a call met the replica of the new model"
    reward.replicas = [[NEW], [NEW]]
    assert revisions_of(adopting.collect(prompts, seed=9, weights_version=0)) == {NEW}


def test_the_last_of_many_replicas_is_found(
    world: World, tmp_path: Path, prompts: list[PromptRecord], old: str
) -> None:
    reward = fleet(world, *[[NEW, old] if number == 0 else [NEW] for number in range(5)])
    refusing = collector(world, tmp_path, reward)
    rollout = refusing.collect(prompts, seed=7, weights_version=0)
    assert revisions_of(rollout) == {old}


def test_going_back_to_the_model_before_is_an_adoption_like_any_other(
    world: World, tmp_path: Path, prompts: list[PromptRecord], old: str
) -> None:
    reward = fleet(world, [NEW, old])
    adopting = collector(world, tmp_path, reward, **ADOPT)
    assert revisions_of(adopting.collect(prompts, seed=7, weights_version=0)) == {NEW}
    reward.replicas = [[old, NEW]]
    assert revisions_of(adopting.collect(prompts, seed=8, weights_version=0)) == {old}


def test_a_model_that_is_told_and_not_held_ends_the_run(
    world: World, tmp_path: Path, prompts: list[PromptRecord]
) -> None:
    class Forgetful(Fleet):
        def score(self, revision: str, *_: Any, **__: Any) -> Any:
            self.num_refused += 1
            raise NotFound(
                f"revision '{revision}' is not served here.", reason="REVISION_NOT_SERVED"
            )

    reward = Forgetful(world.reward, [[NEW]])
    adopting = collector(world, tmp_path, reward, **ADOPT, wait_s=1.0)
    with pytest.raises(NotFound, match=f"'{NEW}' is not served here; the call is repeated"):
        adopting.collect(prompts, seed=7, weights_version=0)
    assert reward.num_refused > NUM_ASKED * 3, "it was tried again before the run was given up"


def test_scores_of_another_model_than_was_asked_are_not_trained_on(
    world: World, tmp_path: Path, prompts: list[PromptRecord], old: str
) -> None:
    class Deaf(Fleet):
        def _served(self, held: list[str], revision: str) -> str:
            return held[0]

    deaf = Deaf(world.reward, [[NEW]])
    with pytest.raises(RolloutError, match=f"asked for the scores of {old} and sent those of"):
        collector(world, tmp_path, deaf).collect(prompts, seed=7, weights_version=0)


# ----------------------------------------------------------------------------------------- the run


def test_the_lineage_names_the_new_model(
    world: World, tmp_path: Path, old: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And the run is resumed with it, which one that refuses new models is not."""
    reward = fleet(world, [old])
    services: Any = replace(world.services(), reward=reward)
    control = Control()

    def roll_out() -> None:
        if control.snapshot.step == 1:
            reward.replicas = [[NEW, old]]
        if control.snapshot.step == 2:
            control.stop()

    control.add_listener(roll_out)
    out = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        train(world.config(out, total_steps=3, services=ADOPT), services, control=control)
    [event] = [it for it in caplog.records if getattr(it, "event", "") == "RewardModelAdopted"]
    assert "from step 2 on" in event.message
    lineage = json.loads((out / "checkpoints/step-000002/policy/kleash.json").read_text())
    assert lineage["reward_model_digest"] == NEW != old
    again = world.config(out, total_steps=3, resume=True)
    with pytest.raises(ConfigError, match=r"the reward model .* is not the one"):
        train(again, world.services())
    report = train(world.config(out, total_steps=3, resume=True, services=ADOPT), services)
    assert report.is_complete
    assert report.digests["reward_model"] == NEW


def test_a_run_that_refuses_is_resumed_with_a_model_that_is_still_held(
    world: World, tmp_path: Path, old: str
) -> None:
    out, control = tmp_path / "run", Control()
    stop_after(control, 1)
    train(world.config(out), world.services(), control=control)
    reward: Any = fleet(world, [NEW, old])
    services = replace(world.services(), reward=reward)
    report = train(world.config(out, resume=True), services)
    assert report.is_complete
    assert report.digests["reward_model"] == old
    assert set(reward.scored) == {old}


def test_a_resumed_run_adopts_when_its_first_step_begins(
    world: World, tmp_path: Path, old: str, caplog: pytest.LogCaptureFixture
) -> None:
    out, control = tmp_path / "run", Control()
    stop_after(control, 1)
    train(world.config(out, services=ADOPT), world.services(), control=control)
    services: Any = replace(world.services(), reward=fleet(world, [NEW]))
    with caplog.at_level(logging.WARNING):
        report = train(world.config(out, resume=True, services=ADOPT), services)
    assert report.digests["reward_model"] == NEW
    events = [getattr(it, "event", "") for it in caplog.records]
    assert events.count("RewardModelAdopted") == 1


def test_an_evaluation_belongs_to_the_step_before_it(
    world: World, tmp_path: Path, old: str
) -> None:
    """The model is replaced while step 2 is scored; given back, when step 4 is."""
    reward: Any = fleet(world, [old])
    evaluation = {"prompts": str(world.prompts), "every": 2, "num_prompts": 3}
    replicas = {6: [[NEW, old]], 13: [[old]]}  # by calls so far; a step has 3, an evaluation 1

    def replace_model() -> None:
        reward.replicas = replicas.get(len(reward.scored), reward.replicas)

    reward.before_score = replace_model
    config = world.config(tmp_path / "run", total_steps=4, services=ADOPT, evaluation=evaluation)
    report = train(config, replace(world.services(), reward=reward))
    evaluated = {
        path.stem: {json.loads(line)["reward_revision"] for line in path.read_bytes().splitlines()}
        for path in (tmp_path / "run" / "evaluations").iterdir()
    }
    assert evaluated == {"step-000000": {old}, "step-000002": {old}, "step-000004": {old}}
    assert reward.scored == [old] * 8 + [NEW] * 3 + [NEW] * 2 + [old] * 4
    assert report.digests["reward_model"] == old
