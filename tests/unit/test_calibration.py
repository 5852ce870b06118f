"""Scores of a new reward model on the scale of the old one (services.calibration=affine)."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.conftest import World
from tests.unit.reward_fleet import Fleet
from tests.unit.test_ppo_resume import stop_after

from kleash.base.errors import ConfigError
from kleash.lm.sequences import TokenSequence
from kleash.ppo import checkpoint
from kleash.ppo.calibration import (
    FEWEST_PROBES,
    Calibration,
    CalibrationError,
    Probe,
    RewardState,
    fit,
)
from kleash.ppo.config import PPOConfig, ServicesConfig
from kleash.ppo.control import Control
from kleash.ppo.train import train

pytestmark = pytest.mark.unit

SECOND, THIRD = "sha256:second", "sha256:third"
AFFINE = {"new_reward_model": "adopt", "calibration": "affine", "calibration_samples": 20}


def probes(scores: list[float]) -> tuple[Probe, ...]:
    sequence = TokenSequence(np.array([5, 6, 7], np.int32), 1)
    return tuple(Probe(str(index), sequence, score) for index, score in enumerate(scores))


# ------------------------------------------------------------------------------------------ the fit


def test_mean_and_deviation_are_those_of_the_old_scores() -> None:
    """By hand: (0, 2, 4) has mean 2 and variance 8/3, (1, 0, 2) mean 1 and variance 2/3: a is 2."""
    old, new = np.array([0.0, 2.0, 4.0]), np.array([1.0, 0.0, 2.0])
    calibration = fit(old, new, "new")
    assert (calibration.scale, calibration.shift) == pytest.approx((2.0, 0.0))
    slope = np.polyfit(new, old, 1)[0]
    assert slope == pytest.approx(1.0), "least squares would halve the spread: correlation is 1/2"


def test_a_model_that_is_the_old_one_in_other_units_changes_nothing() -> None:
    old = np.linspace(-1, 2, 9) ** 3
    calibration = fit(old, 3 * old - 5, "new")
    assert [calibration.apply(3 * score - 5) for score in old] == pytest.approx(list(old))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], "it gives all 3 responses .* the score 4;"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "the model before gives all 3 responses .* score 1;"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], r"fall where those .* rise \(correlation -1\.00\)"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    old: list[float], new: list[float], sentence: str
) -> None:
    with pytest.raises(CalibrationError, match=rf"{sentence}.*services\.calibration=none"):
        fit(np.array(old), np.array(new), "new")


def test_each_model_is_put_on_the_scale_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """The second model's scores are three times the first's; the third's, a tenth, plus one."""
    first = [float(score) for score in np.linspace(-1, 1, 12)]
    state = RewardState("first", probes=probes(first))
    second = state.followed_by("second", [3 * score - 5 for score in first])
    assert [probe.score for probe in second.probes] == pytest.approx(first)
    third = second.followed_by("third", [score / 10 + 1 for score in first])
    assert (third.calibration.scale, third.calibration.shift) == pytest.approx((10.0, -10.0))
    assert [probe.score for probe in third.probes] == pytest.approx(first)
    assert third.revision == "third"


def test_few_responses_are_no_scale(caplog: pytest.LogCaptureFixture) -> None:
    scores = [float(score) for score in range(FEWEST_PROBES - 1)]
    with caplog.at_level(logging.WARNING):
        state = RewardState("old", Calibration(2.0, 1.0), probes(scores)).followed_by("new", scores)
    assert (state.revision, state.calibration, state.probes) == ("new", Calibration(), ())
    assert "new is not calibrated: the run has 7 responses" in caplog.text


def test_the_newest_probes_are_kept() -> None:
    state = RewardState("old").with_probes(probes([1.0, 2.0, 3.0]), 4)
    state = state.with_probes(probes([4.0, 5.0]), 4)
    assert [probe.score for probe in state.probes] == [2.0, 3.0, 4.0, 5.0]


def test_a_calibration_without_new_models_is_refused() -> None:
    with pytest.raises(ValueError, match="set new_reward_model to adopt"):
        ServicesConfig(calibration="affine")


# ------------------------------------------------------------------------------------------ the run


def four_steps(world: World, out: Path, **changes: Any) -> PPOConfig:
    return world.config(
        out,
        total_steps=4,
        checkpoint={"every": 1, "keep": 9},
        samples={"per_step": 12},
        **{"services": AFFINE, **changes},
    )


def fleet(world: World, **functions: Callable[[float], float]) -> Fleet:
    first = world.reward.get_model().model.revision
    return Fleet(world.reward, [[first]], {f"sha256:{name}": f for name, f in functions.items()})


def bent(score: float) -> float:
    return math.tanh(score) * 2 + 1


def rolled_out(reward: Fleet, after: dict[int, str]) -> Control:
    """The model is replaced once a step is done; the one before is given back at once."""
    control = Control()

    def replace_model() -> None:
        if revision := after.get(control.snapshot.step):
            reward.replicas = [[revision]]

    control.add_listener(replace_model)
    return control


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    lines = (out / name).read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def test_a_model_in_other_units_trains_as_the_old_one(world: World, tmp_path: Path) -> None:
    """Scores of the second model are 3 times the first's minus 5, and those of the third a half."""
    reward: Any = fleet(world, second=lambda s: 3 * s - 5, third=lambda s: s / 2)
    services = replace(world.services(), reward=reward)
    control = rolled_out(reward, {1: SECOND, 3: THIRD})
    report = train(four_steps(world, tmp_path / "run"), services, control=control)
    plain = train(four_steps(world, tmp_path / "plain"), world.services())
    for row, same in zip(
        world.learned(tmp_path / "run"), world.learned(tmp_path / "plain"), strict=True
    ):
        for key in ("score_mean", "score_std", "reward_mean", "kl_per_sequence"):
            assert row[key] == pytest.approx(same[key], abs=1e-5), key
    scales = [row["reward_calibration_scale"] for row in world.learned(tmp_path / "run")]
    assert scales == pytest.approx([1, 1 / 3, 1 / 3, 2], rel=1e-5)
    shifts = [row["reward_calibration_shift"] for row in world.learned(tmp_path / "run")]
    assert shifts == pytest.approx([0, 5 / 3, 5 / 3, 0], abs=1e-5)
    assert report.digests["reward_model"] == THIRD
    assert plain.digests["reward_model"] != THIRD
    samples = rows(tmp_path / "run", "samples.jsonl")
    assert len(samples) == 48
    for sample, row in zip(samples[12:24], [1] * 12, strict=True):
        assert sample["step"] == row + 1
        assert sample["reward_revision"] == SECOND
        assert sample["uncalibrated_score"] == pytest.approx(3 * sample["score"] - 5, abs=1e-4)


def test_the_probe_set_has_the_old_mean_and_deviation(world: World, tmp_path: Path) -> None:
    """Of a model that is no straight line of the old one; from the checkpoints of the run."""
    reward: Any = fleet(world, second=bent)
    services = replace(world.services(), reward=reward)
    out = tmp_path / "run"
    train(four_steps(world, out), services, control=rolled_out(reward, {2: SECOND}))
    before, after = (checkpoint.newest(only(out, step)) for step in (2, 3))
    assert before is not None
    assert after is not None
    assert len(before.reward.probes) == 20
    assert before.reward.calibration == Calibration()
    old = np.array([probe.score for probe in before.reward.probes])
    new = np.array([after.reward.calibration.apply(bent(score)) for score in old])
    assert (new.mean(), new.std()) == pytest.approx((old.mean(), old.std()), rel=1e-9)
    assert np.abs(new - old).max() > 1e-3
    # The 12 newest of 20 are of step 3: 8 of those that the new model scored again are left.
    assert [p.sequence.ids.tolist() for p in after.reward.probes[:8]] == [
        p.sequence.ids.tolist() for p in before.reward.probes[12:]
    ]
    assert [p.score for p in after.reward.probes[:8]] == pytest.approx(list(new[12:]))
    lineage = json.loads((after.path / "policy" / "kleash.json").read_text())
    assert lineage["reward_calibration"] == {
        "scale": after.reward.calibration.scale,
        "shift": after.reward.calibration.shift,
    }


def only(out: Path, step: int) -> Path:
    """A checkpoints folder with that step alone."""
    folder = out / f"only-{step}"
    shutil.copytree(out / f"checkpoints/step-{step:06d}", folder / f"step-{step:06d}")
    return folder


def test_a_run_that_was_killed_is_resumed_with_the_same_calibration(
    world: World, tmp_path: Path
) -> None:
    """Killed in the step that adopted, and in the one after: the same bits as without."""

    def run(out: Path, **changes: Any) -> Any:
        reward: Any = fleet(world, second=bent)
        if changes:
            reward.replicas = [[SECOND]]
        services = replace(world.services(), reward=reward)
        config = four_steps(world, out).model_copy(update=changes)
        return train(config, services, control=rolled_out(reward, {2: SECOND}))

    whole = run(tmp_path / "whole")
    for last in (2, 3):
        out = tmp_path / f"killed-after-{last}"
        shutil.copytree(tmp_path / "whole", out)
        shutil.rmtree(out / "policy")
        for step in range(last + 1, 5):
            shutil.rmtree(out / f"checkpoints/step-{step:06d}")
        rest = run(out, resume=True)
        assert rest.digests == whole.digests
        assert world.learned(out) == world.learned(tmp_path / "whole")
        assert rows(out, "samples.jsonl") == rows(tmp_path / "whole", "samples.jsonl")
        newest, same = (
            checkpoint.newest(folder / "checkpoints") for folder in (out, tmp_path / "whole")
        )
        assert newest is not None
        assert same is not None
        assert newest.reward.calibration == same.reward.calibration != Calibration()
        assert [p.score for p in newest.reward.probes] == [p.score for p in same.reward.probes]


def test_a_model_that_ranks_the_other_way_ends_the_run(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was learned is kept, and calibration=none takes the new scores as they are, and needs
    no responses to compare them on.
    """
    reward: Any = fleet(world, second=lambda s: -s)
    services = replace(world.services(), reward=reward)
    config = four_steps(world, tmp_path / "run")
    with pytest.raises(CalibrationError, match=r"correlation -1\.00"):
        train(config, services, control=rolled_out(reward, {2: SECOND}))
    taken = {"new_reward_model": "adopt"}
    again = four_steps(world, tmp_path / "run", services=taken, resume=True)
    assert train(again, services).is_complete
    assert "is not calibrated" not in caplog.text
    assert "reward_calibration_scale" not in world.learned(tmp_path / "run")[-1]


def test_a_calibration_stays_with_a_run_that_refuses_from_then_on(
    world: World, tmp_path: Path
) -> None:
    reward: Any = fleet(world, second=lambda s: 3 * s - 5)
    services = replace(world.services(), reward=reward)
    control = rolled_out(reward, {2: SECOND})
    stop_after(control, 3)
    train(four_steps(world, tmp_path / "run"), services, control=control)
    again = four_steps(world, tmp_path / "run", services={"wait_s": 5}, resume=True)
    assert train(again, services).is_complete
    last = world.learned(tmp_path / "run")[-1]
    assert last["reward_calibration_scale"] == pytest.approx(1 / 3, rel=1e-5)
    with pytest.raises(ConfigError, match=r"the reward model .* is not the one"):
        train(again, world.services())


def test_an_evaluation_is_on_the_scale_of_the_run(world: World, tmp_path: Path) -> None:
    evaluation = {"prompts": str(world.prompts), "every": 2, "num_prompts": 6}
    reward: Any = fleet(world, second=lambda s: 3 * s - 5)
    services = replace(world.services(), reward=reward)
    control = rolled_out(reward, {1: SECOND})
    config = four_steps(world, tmp_path / "run", evaluation=evaluation)
    report = train(config, services, control=control)
    plain = train(four_steps(world, tmp_path / "plain", evaluation=evaluation), world.services())
    key = "evaluation/score_mean"
    assert report.evaluation_last[key] == pytest.approx(plain.evaluation_last[key], abs=1e-4)
