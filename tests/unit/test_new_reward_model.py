"""A reward model that is replaced in the middle of a run: refused, or adopted whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.conftest import World

from kleash.base.errors import ConfigError
from kleash.client.reward import Score
from kleash.data.prompts import PromptRecord, load_prompts
from kleash.lm.load import load_tokenizer
from kleash.ppo.control import Control
from kleash.ppo.rollout import RolloutError
from kleash.ppo.train import train
from kleash.rpc.errors import PreconditionFailed

pytestmark = pytest.mark.unit

NEW = "sha256:new"


@dataclass
class Rolling:
    """Two models behind one address; ``answers`` says whether the new one takes a call, by its
    number; ``stays_old`` are tokens of a sequence that only the old one ever scores.

    The new one gives every response the score 10 and calls itself NEW.
    """

    reward: Any
    answers: Any
    calls: list[bool] = field(default_factory=list)
    is_rolled_out: bool = False
    stays_old: bytes = b""

    def get_model(self) -> Any:
        model = self.reward.get_model()
        if self.is_rolled_out:
            model.model.revision = NEW
        return model

    def score_tokens(self, sequences: Sequence[Any], **options: Any) -> list[Score]:
        first = sequences[0].ids.tobytes()
        if not self.calls:
            self.stays_old = first if self.stays_old == b"first" else b""
        is_new = self.is_rolled_out or self.answers(len(self.calls))
        is_new = is_new and first != self.stays_old
        self.calls.append(is_new)
        scores = self.reward.score_tokens(sequences, **options)
        return [replace(its, value=10.0, revision=NEW) for its in scores] if is_new else scores


@pytest.fixture
def prompts(world: World) -> list[PromptRecord]:
    records = load_prompts(str(world.prompts), load_tokenizer(world.model), max_tokens=40)
    return list(records) * 2


def collector(world: World, tmp_path: Path, reward: Rolling) -> Any:
    config = world.config(tmp_path, services={"new_reward_model": "adopt"})
    return world.collector(replace(world.services(), reward=reward), config)


def test_a_step_that_two_models_scored_is_scored_again_by_one(
    world: World, tmp_path: Path, prompts: list[PromptRecord]
) -> None:
    """Three groups of four: the second is answered by a replica that is new already."""
    reward = Rolling(world.reward, lambda call: call == 1 or call > 2)
    rollout = collector(world, tmp_path, reward).collect(prompts, seed=7, weights_version=0)
    assert rollout.reward_revision == NEW
    assert [sample.score for sample in rollout.samples] == [10.0] * 12
    assert reward.calls == [False, True, False, True, True], "the group that was right stays"


def test_without_a_change_nothing_is_scored_twice(
    world: World, tmp_path: Path, prompts: list[PromptRecord]
) -> None:
    reward = Rolling(world.reward, lambda call: False)
    rollout = collector(world, tmp_path, reward).collect(prompts, seed=7, weights_version=0)
    assert rollout.reward_revision == world.reward.get_model().model.revision
    assert reward.calls == [False] * 3


def test_two_models_that_stay_end_the_run(
    world: World, tmp_path: Path, prompts: list[PromptRecord]
) -> None:
    reward = Rolling(world.reward, lambda call: call > 0, stays_old=b"first")
    config = world.config(tmp_path, services={"new_reward_model": "adopt", "wait_s": 1.0})
    mixed = world.collector(replace(world.services(), reward=reward), config)
    with pytest.raises(PreconditionFailed, match="2 reward models scored this step") as caught:
        mixed.collect(prompts, seed=7, weights_version=0)
    assert caught.value.reason == "REVISION_CHANGED"
    assert len(reward.calls) > 3, "it was tried again before the run was given up"


def test_the_lineage_names_the_new_model(world: World, tmp_path: Path) -> None:
    """And the run is resumed with it, which one that refuses new models is not."""
    reward = Rolling(world.reward, lambda call: False)
    services: Any = replace(world.services(), reward=reward)
    control = Control()
    old = world.reward.get_model().model.revision

    def roll_out() -> None:
        if control.snapshot.step == 1:
            reward.is_rolled_out = True
        if control.snapshot.step == 2:
            control.stop()

    control.add_listener(roll_out)
    out = tmp_path / "run"
    adopting = {"new_reward_model": "adopt"}
    config = world.config(out, total_steps=3, services=adopting)
    train(config, services, control=control)
    lineage = json.loads((out / "checkpoints/step-000002/policy/kleash.json").read_text())
    assert lineage["reward_model_digest"] == NEW != old
    again = world.config(out, total_steps=3, resume=True)
    with pytest.raises(ConfigError, match=r"the reward model .* is not the one"):
        train(again, world.services())
    report = train(world.config(out, total_steps=3, resume=True, services=adopting), services)
    assert report.is_complete
    assert report.digests["reward_model"] == NEW


def test_by_default_it_is_refused(
    world: World, tmp_path: Path, prompts: list[PromptRecord]
) -> None:
    reward: Any = Rolling(world.reward, lambda call: call == 1)
    refusing = world.collector(replace(world.services(), reward=reward), world.config(tmp_path))
    with pytest.raises(RolloutError, match=r"sha256:new.*services.new_reward_model=adopt"):
        refusing.collect(prompts, seed=7, weights_version=0)
