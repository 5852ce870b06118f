"""A recorded step: done again to the last bit from its recording, or with other scores."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.conftest import World

from kleash.base.config import load_config
from kleash.base.errors import ConfigError
from kleash.cli.main import main
from kleash.ppo.config import PPOConfig
from kleash.ppo.recorded_calls import read_calls
from kleash.ppo.recorder import Recording, open_recording, recordings_in
from kleash.ppo.replay import differences, replay
from kleash.ppo.replay_scores import compare_scores
from kleash.ppo.replay_services import ReplayError
from kleash.ppo.services import Services
from kleash.ppo.train import train
from kleash.rpc.errors import Unavailable

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def recorded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on two replicas, of which the second and third are recorded."""
    out = tmp_path_factory.mktemp("recorded") / "run"
    config = world.config(out, total_steps=3, record={"steps": [2], "every": 3})
    train(config, world.services(num_policies=2))
    return out


def copy_of(recorded: Path, folder: Path) -> Recording:
    shutil.copytree(recorded / "recordings" / "step-000003", folder / "step-000003")
    return open_recording(folder / "step-000003")


def rewrite(recording: Recording, change: Any) -> None:
    """Pass each recorded call through ``change``, which returns it or None to drop it."""
    changed = [change(call) for call in read_calls(recording.calls)]
    recording.calls.write_text("".join(call.to_line() for call in changed if call is not None))


def test_the_chosen_steps_are_recorded(recorded: Path) -> None:
    paths = recordings_in(recorded / "recordings")
    assert [path.name for path in paths] == ["step-000002", "step-000003"]
    assert sorted(path.name for path in (recorded / "recordings").iterdir()) == [
        path.name for path in paths
    ]


@pytest.mark.parametrize("step", [2, 3])
def test_a_replay_has_the_very_figures_and_models_of_the_step(recorded: Path, step: int) -> None:
    recording = open_recording(recorded, step)
    again = replay(recording)
    assert differences(recording, again) == []
    assert again.after == recording.described["after"]
    rows = [json.loads(line) for line in (recorded / "metrics.jsonl").read_text().splitlines()]
    of_run = next(row for row in rows if row.get("step") == step and "step_s" in row)
    for name in ("policy_loss", "value_loss", "score_mean", "kl_per_sequence", "approx_kl"):
        assert again.figures[name] == of_run[name], name


def test_recordings_do_not_change_the_run(recorded: Path, world: World, tmp_path: Path) -> None:
    train(world.config(tmp_path / "run", total_steps=3), world.services(num_policies=2))
    assert world.learned(tmp_path / "run") == world.learned(recorded)


def test_a_replay_notices_a_score_that_is_not_the_recorded_one(
    recorded: Path, tmp_path: Path
) -> None:
    recording = copy_of(recorded, tmp_path)

    def change(call: Any) -> Any:
        if call.method == "Score":
            call.reply[0]["value"] += 1e-3
        return call

    rewrite(recording, change)
    again = replay(recording)
    names = {each.name for each in differences(recording, again)}
    assert {"score_mean", "policy_loss", "value_loss"} <= names
    assert again.after != recording.described["after"]


def test_a_question_that_was_not_recorded_is_an_error(recorded: Path, tmp_path: Path) -> None:
    recording = copy_of(recorded, tmp_path)
    rewrite(recording, lambda call: None if call.method == "LogProbs" else call)
    with pytest.raises(ReplayError, match="no reply to a reference LogProbs"):
        replay(recording)


def test_the_calls_hold_requests_and_replies(recorded: Path) -> None:
    calls = read_calls(open_recording(recorded, 3).calls)
    kinds = {(call.service, call.method) for call in calls}
    assert kinds >= {
        ("policy", "Generate"),
        ("reward", "GetModel"),
        ("reward", "Score"),
        ("reference", "GetModel"),
        ("reference", "LogProbs"),
    }
    assert {call.replica for call in calls if call.method == "Generate"} == {0, 1}
    assert all(call.began_s <= call.ended_s and call.error is None for call in calls)
    responses = [row for call in calls if call.method == "Generate" for row in call.reply]
    assert len(responses) == 12


class FailsOnce:
    """A policy whose first stream breaks off after two responses."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.has_failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def generate(self, *args: Any, **keywords: Any) -> Any:
        stream = self._policy.generate(*args, **keywords)
        if self.has_failed:
            yield from stream
            return
        self.has_failed = True
        yield next(stream)
        yield next(stream)
        raise Unavailable("gone for a moment.")


def test_a_step_with_a_broken_stream_is_replayed_as_it_went(world: World, tmp_path: Path) -> None:
    services = world.services()
    config = world.config(tmp_path / "run", total_steps=1, record={"every": 1})
    train(config, dataclasses.replace(services, policies={0: FailsOnce(services.policies[0])}))
    recording = open_recording(tmp_path / "run")
    streams = [call for call in read_calls(recording.calls) if call.method == "Generate"]
    assert [call.error is not None for call in streams] == [True, False]
    assert streams[0].error == {
        "code": "UNAVAILABLE",
        "reason": "",
        "message": "gone for a moment.",
    }
    again = replay(recording)
    assert differences(recording, again) == []
    assert again.after == recording.described["after"]


def test_old_recordings_go_and_those_of_steps_that_are_done_again(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    record = {"every": 1, "keep": 2}
    train(
        world.config(out, total_steps=4, record=record, checkpoint={"every": 2}), world.services()
    )
    assert [path.name for path in recordings_in(out / "recordings")] == [
        "step-000003",
        "step-000004",
    ]
    shutil.rmtree(out / "checkpoints" / "step-000004")
    (out / "recordings" / ".step-000009.partial").mkdir()
    config = world.config(
        out, total_steps=4, record={"steps": [1]}, checkpoint={"every": 2}, resume=True
    )
    train(config, world.services())
    assert [path.name for path in (out / "recordings").iterdir()] == []


def test_another_reward_model_scores_the_recorded_responses(
    recorded: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kleash.lm.heads import reward_model_from_causal_lm
    from kleash.lm.load import load_tokenizer, save_checkpoint_folder

    other = reward_model_from_causal_lm(world.model, seed=77)
    save_checkpoint_folder(other, load_tokenizer(world.model), tmp_path / "rm", {"stage": "test"})
    found = tmp_path / "found.json"
    flags = [f"--reward_model={tmp_path / 'rm'}", "--step=3", f"--json={found}"]
    assert main(["replay", str(recorded), *flags]) == 0
    told = capsys.readouterr().out
    assert "all" in told
    assert "figures and the digests of both models" in told
    document = json.loads(found.read_text())
    assert document["is_identical"] is True
    changed = {each["name"] for each in document["other_reward_model"]["figures"]}
    assert {"score_mean", "policy_loss"} <= changed
    # What does not depend on scores is as it was.
    assert not {"kl_per_sequence", "entropy", "response_length_mean"} & changed
    responses = document["other_reward_model"]["responses"]
    assert len(responses) == 12
    gaps = [abs(row["other_score"] - row["score"]) for row in responses]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0
    assert f"{responses[0]['other_score']:+9.4f}" in told


def test_the_same_reward_model_changes_nothing(
    recorded: Path, world: World, tmp_path: Path
) -> None:
    found = tmp_path / "found.json"
    arguments = [str(recorded), f"--reward_model={world.reward_model}", f"--json={found}"]
    assert main(["replay", *arguments]) == 0
    other = json.loads(found.read_text())["other_reward_model"]
    assert other["figures"] == []
    assert other["scores"]["correlation"] == pytest.approx(1.0)


def test_the_command_says_what_differs(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = copy_of(recorded, tmp_path)
    described = json.loads((recording.path / "recording.json").read_text())
    described["figures"]["policy_loss"] += 0.5
    described["environment"]["software"]["torch"] = "1.0"
    (recording.path / "recording.json").write_text(json.dumps(described))
    assert main(["replay", str(recording.path)]) == 1
    told = capsys.readouterr().out
    assert "1 of " in told
    assert "figures differ" in told
    assert "policy_loss" in told
    assert "-0.5" in told
    assert "torch is " in told
    assert "and was 1.0" in told


def test_bad_input_is_named(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert main(["replay", *arguments]) == 2
        return capsys.readouterr().err

    assert "is no folder" in error(str(tmp_path / "none"))
    assert "holds no recordings; record steps with" in error(str(tmp_path))
    assert "step 1 is not recorded" in error(str(recorded), "--step=1")
    assert "there are 2, 3" in error(str(recorded), "--step=1")
    one = str(recorded / "recordings" / "step-000003")
    assert "holds step 3, not 2" in error(one, "--step=2")
    assert "take one" in error(one, "--reward=a:1", "--reward_model=b")
    recording = copy_of(recorded, tmp_path)
    (recording.before / "state.json").write_text("{}")
    assert "is damaged (state.json is not what was written)" in error(str(recording.path))
    (recording.path / "recording.json").write_text('{"format": 99}')
    assert "format 99" in error(str(recording.path))
    (recording.path / "recording.json").unlink()
    run = recording.path.parent.parent / "run" / "recordings"
    shutil.copytree(recording.path, run / "step-000003")
    assert "recording.json cannot be read" in error(str(run.parent))
    assert "--json: " in error(one, f"--json={tmp_path / 'none' / 'found.json'}")
    assert "device is cuda:63" in error(one, "--device=cuda:63")


def test_calls_that_cannot_be_read_are_named(recorded: Path, tmp_path: Path) -> None:
    recording = copy_of(recorded, tmp_path)
    whole = recording.calls.read_text()
    recording.calls.write_text(whole[:-20])
    with pytest.raises(ConfigError, match=r"calls in .*calls\.jsonl cannot be read"):
        replay(recording)

    def drop_one(call: Any) -> Any:
        if call.method == "Generate" and call.replica == 0:
            call.reply.pop()
        return call

    recording.calls.write_text(whole)
    rewrite(recording, drop_one)
    with pytest.raises(ReplayError, match="lacks 1 responses that the step asks for"):
        replay(recording)
    recording.calls.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        replay(recording)


@pytest.mark.parametrize("written", ["3", "[3]"])
def test_a_single_step_needs_no_brackets(world: World, tmp_path: Path, written: str) -> None:
    keys = {"out": tmp_path, "prompts": world.prompts, "model": world.model}
    flags = [f"--{key}={value}" for key, value in keys.items()]
    flags += [f"--reward_model={world.reward_model}", f"--record.steps={written}"]
    assert load_config(PPOConfig, flags).record.steps == (3,)


def test_steps_that_would_not_be_recorded_or_not_be_kept_are_refused(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the first step is 1"):
        world.config(tmp_path, record={"steps": [0]})
    with pytest.raises(ValueError, match="names 3 steps, and of them the newest 2 are kept"):
        world.config(tmp_path, record={"steps": [1, 2, 3, 3], "keep": 2}, total_steps=9)
    with pytest.raises(ValueError, match="names 3, and the run has 2 total_steps"):
        world.config(tmp_path, record={"steps": [1, 3]})


def test_scores_are_compared_by_value_rank_and_pair() -> None:
    compared = compare_scores([1.0, 2.0, 3.0, 3.0], [10.0, 30.0, 20.0, 40.0])
    assert compared.mean == (2.25, 25.0)
    assert compared.standard_deviation == pytest.approx((np.std([1, 2, 3, 3]), np.sqrt(125)))
    # Ranks 0, 1, 2.5, 2.5 and 0, 2, 1, 3.
    assert compared.rank_correlation == pytest.approx(
        np.corrcoef([0, 1, 2.5, 2.5], [0, 2, 1, 3])[0, 1]
    )
    # Of six pairs one is a tie of the first model; of five one is turned round.
    assert compared.pair_agreement == pytest.approx(4 / 5)
    assert compare_scores([1.0, 1.0], [1.0, 2.0]).pair_agreement is None


def test_services_of_a_replay_are_the_recorded_ones(recorded: Path) -> None:
    from kleash.ppo.replay_services import replay_services

    services: Services = replay_services(read_calls(open_recording(recorded, 2).calls))
    assert sorted(services.policies) == [0, 1]
    with pytest.raises(ReplayError, match="does not say what GetPolicy answers"):
        services.policies[0].get_policy()
    with pytest.raises(ConfigError, match="no reply to a reward GetModel"):
        services.reward.pinned("sha256:other").get_model()
