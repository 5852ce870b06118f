"""Recorded steps in which something went wrong: replicas, reward models, disks, devices, stops."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from tests.unit.conftest import World
from tests.unit.reward_fleet import Fleet
from tests.unit.test_ppo_resume import stop_after

from kleash.base.errors import ConfigError
from kleash.cli.main import main
from kleash.ppo import checkpoint, recorder, recording_services
from kleash.ppo.control import Control
from kleash.ppo.recorded_calls import read_calls
from kleash.ppo.recorder import open_recording, recordings_in
from kleash.ppo.recording_services import CallLog
from kleash.ppo.replay import differences, different, replay
from kleash.ppo.train import train
from kleash.rpc.errors import Unavailable

pytestmark = pytest.mark.unit

NEW, NOT_SERVED = "sha256:new", "REVISION_NOT_SERVED"


def assert_is_identical(run: Path, step: int) -> None:
    recording = open_recording(run, step)
    again = replay(recording)
    assert differences(recording, again) == []
    assert again.after == recording.described["after"]


# ------------------------------------------------------------------------------------- the services


class Fails:
    """A policy that is gone before it answers."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def generate(self, *args: Any, **keywords: Any) -> Any:
        raise Unavailable("gone.")
        yield


class Leaving(dict[int, Any]):
    """Replicas of which number 1 is there until it is asked for a share."""

    def __getitem__(self, key: int) -> Any:
        if key == 1:
            raise KeyError(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("away", ["silent", "left"])
def test_a_share_that_another_replica_took_over(world: World, tmp_path: Path, away: str) -> None:
    """No call of its own replica is recorded, or one that failed: the groups are those of two
    shares all the same."""
    services = world.services(num_policies=2)
    policies: dict[int, Any] = dict(services.policies)
    if away == "silent":
        policies[1] = Fails(policies[1])
    else:
        policies = Leaving(policies)
    config = world.config(
        tmp_path / "run", total_steps=1, record={"every": 1}, publish={"quorum": 1},
        services={"policy": ["a:1", "b:1"], "group_size": 4, "wait_s": 5},
    )  # fmt: skip
    train(config, dataclasses.replace(services, policies=policies))
    calls = read_calls(open_recording(tmp_path / "run").calls)
    answered = {call.replica for call in calls if call.method == "Generate" and not call.error}
    assert answered == {0}
    assert_is_identical(tmp_path / "run", 1)


def adopting(world: World, out: Path, **changes: Any) -> Any:
    services = {"new_reward_model": "adopt", "group_size": 4, "wait_s": 20}
    return world.config(out, services=services | changes, record={"every": 1})


@pytest.mark.parametrize("calibration", ["none", "affine"])
def test_a_step_that_adopts_a_reward_model(world: World, tmp_path: Path, calibration: str) -> None:
    old = world.reward.get_model().model.revision
    reward = Fleet(world.reward, [[old]], {NEW: lambda score: 3 * score + 1})

    def switch() -> None:
        if len(reward.scored) == 3:  # the groups of the first step
            reward.replicas = [[NEW]]

    reward.before_score = switch
    config = adopting(world, tmp_path / "run", calibration=calibration)
    train(config, dataclasses.replace(world.services(), reward=reward))
    assert NEW in reward.scored
    for step in (1, 2):
        assert_is_identical(tmp_path / "run", step)


def test_a_step_whose_reward_model_is_given_back_in_its_middle(
    world: World, tmp_path: Path
) -> None:
    """Some groups have scores of the old model, calls for others were refused."""
    old = world.reward.get_model().model.revision
    reward = Fleet(world.reward, [[old]], {NEW: lambda score: 3 * score + 1})

    def give_back() -> None:
        if reward.scored:
            reward.replicas = [[NEW]]

    reward.before_score = give_back
    config = adopting(world, tmp_path / "run")
    train(config, dataclasses.replace(world.services(), reward=reward))
    assert reward.num_refused
    calls = read_calls(open_recording(tmp_path / "run", 1).calls)
    scored = {call.request["revision"] for call in calls if call.method == "Score"}
    assert scored == {old, NEW}
    assert_is_identical(tmp_path / "run", 1)

    # Of how many groups the old model was asked depends on who was quick; the step does not.
    recording = open_recording(tmp_path / "run", 1)
    refused = [call for call in calls if call.error and call.error["reason"] == NOT_SERVED]
    others = [call for call in calls if call not in refused]
    recording.calls.write_text("".join(call.to_line() for call in [*others, refused[0]]))
    assert_is_identical(tmp_path / "run", 1)
    answered = [call for call in others if call.request.get("revision") != old]
    recording.calls.write_text("".join(call.to_line() for call in [*answered, refused[0]]))
    assert_is_identical(tmp_path / "run", 1)


def test_a_step_that_trains_the_value_network_alone_and_one_with_pretraining_data(
    world: World, tmp_path: Path
) -> None:
    data = tmp_path / "demonstrations.jsonl"
    rows = [{"prompt": "What is 3 plus 4?", "completion": "3 plus 4 is 7."}] * 3
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = world.config(
        tmp_path / "run", value={"warmup_steps": 1, "learning_rate": 1e-3},
        ptx={"data": str(data), "batch_size": 2}, record={"every": 1},
    )  # fmt: skip
    train(config, world.services())
    for step in (1, 2):
        assert_is_identical(tmp_path / "run", step)
    recording = open_recording(tmp_path / "run", 2)
    data.write_text(data.read_text().replace("7", "8"))
    with pytest.raises(ConfigError, match="is not the pretraining data"):
        replay(recording)


# ------------------------------------------------------------------------------------------ the run


def test_a_step_that_was_abandoned_leaves_no_recording_and_is_recorded_when_done_again(
    world: World, tmp_path: Path
) -> None:
    control = Control()
    services = world.services()
    seen = []

    class Stopping:
        def __getattr__(self, name: str) -> Any:
            return getattr(services.policies[0], name)

        def generate(self, *args: Any, **keywords: Any) -> Any:
            seen.append(1)
            for number, generated in enumerate(services.policies[0].generate(*args, **keywords)):
                if len(seen) == 2 and number == 3:
                    control.stop(abandon_rollout=True)
                yield generated

    config = world.config(tmp_path / "run", total_steps=3, record={"every": 1})
    train(config, dataclasses.replace(services, policies={0: Stopping()}), control=control)
    folder = tmp_path / "run" / "recordings"
    assert [path.name for path in folder.iterdir()] == ["step-000001"]
    train(config.model_copy(update={"resume": True}), world.services())
    for step in (1, 2, 3):
        assert_is_identical(tmp_path / "run", step)


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


class FullFile:
    """A file of calls on a disk that is full after the first."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._num_written = 0

    def write(self, text: str) -> None:
        self._num_written += 1
        if self._num_written > 1:
            full_disk()
        self._file.write(text)

    def close(self) -> None:
        self._file.close()


def full_at_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    save_file, calls = checkpoint.save_file, []

    def fails_first(*args: Any, **keywords: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise SafetensorError("No space left on device")
        save_file(*args, **keywords)

    monkeypatch.setattr(checkpoint, "save_file", fails_first)


def full_at_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    open_log, opened = CallLog.open, []

    def open_full(log: CallLog, path: Path) -> None:
        open_log(log, path)
        opened.append(1)
        if len(opened) == 1:
            log._file = FullFile(log._file)  # type: ignore[assignment]

    monkeypatch.setattr(CallLog, "open", open_full)


def full_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    flush_tree, calls = recorder.flush_tree, []

    def fails_first(folder: Path) -> None:
        calls.append(1)
        if len(calls) == 1:
            full_disk()
        flush_tree(folder)

    monkeypatch.setattr(recorder, "flush_tree", fails_first)


@pytest.mark.parametrize("fill", [full_at_checkpoint, full_at_calls, full_at_the_end])
def test_a_recording_that_cannot_be_written_does_not_end_the_run(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fill: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fill(monkeypatch)
    with caplog.at_level(logging.WARNING):
        train(world.config(tmp_path / "run", record={"every": 1}), world.services())
    told = [record.message for record in caplog.records if "is not recorded" in record.message]
    assert len(told) == 1
    assert told[0].startswith("step 1 is not recorded: ")
    assert "No space left on device; the run goes on" in told[0]
    folder = tmp_path / "run" / "recordings"
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    assert_is_identical(tmp_path / "run", 2)
    train(world.config(tmp_path / "plain"), world.services())
    assert world.learned(tmp_path / "run") == world.learned(tmp_path / "plain")


def test_folders_that_are_no_recordings_are_left_alone(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = world.config(out, total_steps=2, record={"every": 1})
    control = Control()
    stop_after(control, 1)
    train(config, world.services(), control=control)
    (out / "recordings" / "step-000002.kept").mkdir()
    train(config.model_copy(update={"resume": True}), world.services())
    assert (out / "recordings" / "step-000002.kept").is_dir()
    assert len(recordings_in(out / "recordings")) == 2


def test_steps_that_are_not_recorded_cost_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    for name in ("generate_request", "score_request", "log_probs_request"):
        made = getattr(recording_services.calls, name)

        def note(*args: Any, made: Any = made, name: str = name, **keywords: Any) -> Any:
            begun.append(name)
            return made(*args, **keywords)

        monkeypatch.setattr(recording_services.calls, name, note)
    config = world.config(tmp_path / "run", total_steps=2, record={"steps": [2]})
    control = Control()
    stop_after(control, 1)
    train(config, world.services(), control=control)
    assert begun == []
    train(config.model_copy(update={"resume": True}), world.services())
    assert set(begun) == {"generate_request", "score_request", "log_probs_request"}


# --------------------------------------------------------------------------------------- the replay


def test_figures_that_are_no_numbers_are_the_same(tmp_path: Path) -> None:
    assert different({"a": math.nan, "b": math.inf}, {"a": math.nan, "b": math.inf}) == []
    assert [each.name for each in different({"a": math.nan}, {"a": 1.0})] == ["a"]


@pytest.fixture(scope="module")
def recorded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "run"
    train(world.config(out, total_steps=1, record={"every": 1}), world.services())
    return out


def test_numbers_that_json_has_not_are_words(recorded: Path, tmp_path: Path) -> None:
    path = recorded / "recordings" / "step-000001" / "recording.json"
    whole = path.read_text()
    described = json.loads(whole)
    described["figures"] |= {"ratio_max": math.inf, "score_mean": math.nan}
    path.write_text(json.dumps(described))
    try:
        assert main(["replay", str(recorded), f"--json={tmp_path / 'found.json'}"]) == 1
    finally:
        path.write_text(whole)

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads((tmp_path / "found.json").read_text(), parse_constant=refuse)
    old = {each["name"]: each["recorded"] for each in found["differences"]}
    assert old == {"ratio_max": "inf", "score_mean": "nan"}


def test_a_step_of_a_gpu_is_replayed_on_a_cpu_when_told(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "step-000001"
    shutil.copytree(recorded / "recordings" / "step-000001", path)
    recording = open_recording(path)
    config = json.loads((recording.before / "config.json").read_text())
    (recording.before / "config.json").write_text(json.dumps(config | {"device": "cuda:63"}))
    manifest = json.loads((recording.before / "manifest.json").read_text())
    manifest["files"]["config.json"] = checkpoint._describe(recording.before / "config.json")
    (recording.before / "manifest.json").write_text(json.dumps(manifest))
    described = json.loads((path / "recording.json").read_text())
    described["environment"]["machine"]["device"] = "cuda:63"
    described["figures"]["policy_loss"] += 1e-3
    (path / "recording.json").write_text(json.dumps(described))

    assert main(["replay", str(path)]) == 2
    told = capsys.readouterr().err
    assert "device is cuda:63, but torch finds" in told
    assert "use --device=cpu" in told
    assert main(["replay", str(path), "--device=cpu"]) == 1
    told = capsys.readouterr().out
    assert "device is cpu and was cuda:63" in told
    assert "policy_loss" in told


def test_a_reward_model_that_is_gone_is_named(
    world: World, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value network has its shape."""
    is_dir = Path.is_dir
    monkeypatch.setattr(
        Path, "is_dir", lambda path: path != world.reward_model.resolve() and is_dir(path)
    )
    with pytest.raises(
        ConfigError, match="has the shape of the run's reward model, and its folder"
    ):
        replay(open_recording(recorded))


def test_a_service_that_is_away_is_a_status_of_its_own(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(recorded), "--reward=127.0.0.1:1", "--timeout_s=2"]) == 3
    told = capsys.readouterr()
    assert "figures and the digests of both models" in told.out
    assert "127.0.0.1:1" in told.err
