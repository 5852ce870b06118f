"""Checkpoints, the run folder and the control: complete, verified, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import transformers

from kleash.base.errors import ConfigError
from kleash.lm.digest import model_digest
from kleash.lm.load import load_causal_lm, load_tokenizer
from kleash.ppo import checkpoint
from kleash.ppo.calibration import RewardState
from kleash.ppo.checkpoint import RunPosition
from kleash.ppo.control import Control, RunState, SavedCheckpoint
from kleash.ppo.learner import Learner
from kleash.ppo.randomness import draw, sampling_seed
from kleash.ppo.rollout import Sample
from kleash.ppo.run_folder import open_run_folder

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit

DIGESTS = {"sft_checkpoint": "sha256:a", "tokenizer": "b", "reward_model": "c", "prompts": "d"}


def save(world: World, folder: Path, learner: Learner, step: int) -> Path:
    return checkpoint.save(
        folder,
        learner,
        load_tokenizer(world.model),
        learner.config,
        position=RunPosition(step=step, prompt_position=12 * step, weights_version=step + 1),
        run_id="a-run",
        fence=3,
        digests=DIGESTS,
        reward=RewardState(DIGESTS["reward_model"]),
        lineage={"stage": "ppo"},
    )


# --------------------------------------------------------------------------------- checkpoints


def test_a_loaded_learner_goes_on_bit_for_bit(
    world: World, samples: list[Sample], tmp_path: Path
) -> None:
    kl = {"controller": "adaptive", "coefficient": 0.2, "target": 0.01}
    config = world.config(tmp_path, total_steps=4, kl=kl)
    undisturbed = world.learner(config)
    for step in (1, 2):
        undisturbed.update(undisturbed.prepare(samples)[0], step)
    save(world, tmp_path / "checkpoints", undisturbed, step=2)

    saved = checkpoint.newest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.position == RunPosition(step=2, prompt_position=24, weights_version=3)
    assert (saved.run_id, saved.fence, saved.digests) == ("a-run", 3, DIGESTS)
    resumed = world.learner(config)
    resumed.policy = load_causal_lm(saved.path / "policy")
    resumed = Learner(resumed.policy, resumed.value, config)
    saved.load_into(resumed)
    assert resumed.kl.coefficient == undisturbed.kl.coefficient != 0.2
    for step in (3, 4):
        figures = []
        for learner in (undisturbed, resumed):
            batch, rollout = learner.prepare(samples)
            figures.append(rollout | learner.update(batch, step))
        assert figures[0] == figures[1]
    assert model_digest(resumed.policy) == model_digest(undisturbed.policy)
    assert model_digest(resumed.value) == model_digest(undisturbed.value)


def test_a_checkpoint_holds_no_pickle_and_a_plain_policy_folder(
    world: World, tmp_path: Path
) -> None:
    learner = world.learner(world.config(tmp_path))
    path = save(world, tmp_path, learner, step=1)
    assert path.name == "step-000001"
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja"}
    policy = transformers.AutoModelForCausalLM.from_pretrained(path / "policy")
    assert model_digest(policy) == model_digest(learner.policy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path / "policy")
    assert tokenizer.encode("hello") == load_tokenizer(world.model).encode("hello")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit of the policy": lambda path: flip_a_bit(path / "policy" / "model.safetensors"),
    "a flipped bit of an optimizer": lambda path: flip_a_bit(path / "value_optimizer.safetensors"),
    "a changed state": lambda path: (path / "state.json").write_text("{}"),
    "a missing file": lambda path: (path / "value.safetensors").unlink(),
    "a missing manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"files": {'),
    "another format": lambda path: (path / "manifest.json").write_text('{"files":{},"format":9}'),
}


@pytest.fixture(scope="module")
def two_checkpoints(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    learner = world.learner(world.config(folder))
    save(world, folder / "checkpoints", learner, step=1)
    save(world, folder / "checkpoints", learner, step=2)
    return folder / "checkpoints"


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    two_checkpoints: Path, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    DAMAGE[damage](folder / "step-000002")
    with caplog.at_level(logging.WARNING):
        saved = checkpoint.newest(folder)
    assert saved is not None
    assert saved.position.step == 1
    assert "step-000002 is damaged" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000002.damaged"]


def test_a_write_that_was_cut_off_is_not_a_checkpoint(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    (folder / "step-000002").rename(folder / ".step-000003.partial")
    saved = checkpoint.newest(folder)
    assert saved is not None
    assert saved.position.step == 1
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_the_next_checkpoint_clears_away_what_was_cut_off(world: World, tmp_path: Path) -> None:
    (tmp_path / ".step-000003.partial" / "policy").mkdir(parents=True)
    save(world, tmp_path, world.learner(world.config(tmp_path)), step=4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_the_newest_checkpoints_are_kept(world: World, tmp_path: Path) -> None:
    learner = world.learner(world.config(tmp_path, checkpoint={"keep": 2}))
    for step in (9, 10, 100):
        save(world, tmp_path, learner, step=step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-000100"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 24}, "batch_size"),
        ({"algorithm": {"clip_range": 0.1}}, "algorithm.clip_range"),
        ({"policy": {"learning_rate": 1.0}}, "policy.learning_rate"),
        ({"sampling": {"max_new_tokens": 3}}, "sampling.max_new_tokens"),
        ({"kl": {"coefficient": 0.1}}, "kl.coefficient"),
        ({"total_steps": 3}, "total_steps"),
    ],
)
def test_a_changed_key_that_changes_the_mathematics_is_refused(
    world: World, two_checkpoints: Path, changes: dict[str, Any], key: str
) -> None:
    saved = checkpoint.newest(two_checkpoints)
    assert saved is not None
    with pytest.raises(ConfigError, match=f"'{key}' is .* was started with"):
        saved.check_config(world.config(two_checkpoints.parent, **changes))


def test_what_does_not_change_the_mathematics_may_change(
    world: World, two_checkpoints: Path, tmp_path: Path
) -> None:
    saved = checkpoint.newest(two_checkpoints)
    assert saved is not None
    changes = {
        "micro_batch_tokens": 17,
        "services": {"policy": ["elsewhere:1", "elsewhere:2"]},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 3},
        "resume": True,
        "num_threads": 5,
    }
    saved.config["algorithm"].pop("target_kl")  # as if this key were younger than the checkpoint
    saved.check_config(world.config(tmp_path / "moved", **changes))
    with pytest.raises(ConfigError, match=r"the reward model \(other\) is not the one"):
        saved.check_digests(DIGESTS | {"reward_model": "other"})


# ----------------------------------------------------------------------------------- the folder


def test_a_second_trainer_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        open_run_folder(tmp_path / "run", resume=True),
        pytest.raises(
            ConfigError, match=rf"a trainer works in .*run already \(process {os.getpid()} on "
        ),
        open_run_folder(tmp_path / "run", resume=True),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_a_killed_trainer_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from kleash.ppo.run_folder import open_run_folder\n"
        "with open_run_folder(Path(sys.argv[1]), resume=True):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=False)
    assert ended.returncode == -9
    assert (tmp_path / "run" / "trainer.lock").exists()
    with open_run_folder(tmp_path / "run", resume=True):
        pass


def test_an_existing_run_is_not_overwritten(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run")
    with open_run_folder(config.out, resume=False) as folder:
        folder.begin(config, seen_fence=0)
        run_id = folder.run_id
    with (
        pytest.raises(ConfigError, match="holds a run already; go on with it with --resume"),
        open_run_folder(config.out, resume=False),
    ):
        pass
    with open_run_folder(config.out, resume=True) as folder:
        folder.begin(config, seen_fence=7)
        assert (folder.run_id, folder.fence) == (run_id, 8)


def test_a_run_has_the_id_that_it_was_given_and_keeps_it(world: World, tmp_path: Path) -> None:
    named = world.config(tmp_path / "run", run_id="nightly-7")
    with open_run_folder(named.out, resume=False) as folder:
        folder.begin(named, seen_fence=0)
        assert folder.run_id == "nightly-7"
    with open_run_folder(named.out, resume=True) as folder:
        folder.begin(world.config(named.out), seen_fence=0)  # whoever resumes need not say it
        assert (folder.run_id, folder.fence) == ("nightly-7", 2)
        with pytest.raises(ConfigError, match=r"holds the run 'nightly-7', and run_id is 'other'"):
            folder.begin(world.config(named.out, run_id="other"), seen_fence=0)
        assert json.loads((named.out / "run.json").read_text())["fence"] == 2


def test_the_id_of_a_run_is_not_a_change_of_its_mathematics(
    two_checkpoints: Path, world: World, tmp_path: Path
) -> None:
    """The run folder compares it with run.json; a run that made its id may be told it later."""
    saved = checkpoint.newest(two_checkpoints)
    assert saved is not None
    assert saved.config["run_id"] is None
    saved.check_config(world.config(tmp_path / "moved", run_id="told-later"))


def test_draws_go_through_every_item_once_an_epoch_and_need_no_state() -> None:
    everything = draw(5, seed=3, purpose="prompts", position=0, count=15)
    for epoch in range(3):
        assert sorted(everything[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert everything[:5] != everything[5:10]
    assert draw(5, seed=3, purpose="prompts", position=7, count=6) == everything[7:13]
    assert draw(5, seed=4, purpose="prompts", position=0, count=15) != everything
    assert len({sampling_seed(seed, step) for seed in (0, 1) for step in range(50)}) == 100


# ---------------------------------------------------------------------------------- the control


def test_requests_are_answered_between_steps_and_a_pause_holds(tmp_path: Path) -> None:
    control = Control()
    saved: list[int] = []

    def save_now() -> SavedCheckpoint:
        saved.append(1)
        return SavedCheckpoint(tmp_path, 5)

    request = control.request_checkpoint()
    assert control.may_continue(save_now)
    assert request.result(timeout=0).step == 5
    assert control.pause() is RunState.PAUSED
    while_paused = control.request_checkpoint()
    gone = control.request_checkpoint()
    gone.cancel()
    while_paused.add_done_callback(lambda _: control.resume())
    assert control.may_continue(save_now)
    assert while_paused.result(timeout=0).path == tmp_path
    assert len(saved) == 2
    assert control.stop() is RunState.STOPPING
    assert control.resume() is RunState.STOPPING
    assert not control.may_continue(save_now)
    control.end(RunState.FAILED, "it broke.")
    assert control.snapshot.error_message == "it broke."
    with pytest.raises(RuntimeError, match="the run is over"):
        control.request_checkpoint().result(timeout=0)
