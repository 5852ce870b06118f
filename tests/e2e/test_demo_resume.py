"""``kleash demo --until=... --resume``: what the chart's demo Job runs, and its pod is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kleash.base.config import save_config
from kleash.base.errors import ConfigError
from kleash.base.lock_file import take_lock
from kleash.base.progress import NullProgress
from kleash.demo.config import DemoConfig, StageName
from kleash.demo.folder import RESULTS, demo_folder, move_aside
from kleash.demo.pipeline import Demo
from kleash.demo.settings import DemoSettings, ModelSettings, RewardModelSettings, WorldSettings
from kleash.sources.checkpoint import missing_parts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SMALL = DemoSettings(
    world=WorldSettings(
        base_dialogues=2500,
        sft_dialogues=320,
        comparison_prompts=60,
        held_out_comparison_prompts=30,
        ppo_prompts=50,
        held_out_prompts=20,
    ),
    model=ModelSettings(vocab_size=400, hidden_size=32, num_layers=1, intermediate_size=64),
    # Most responses of a model this small are worth nothing, so that most pairs are tied.
    reward_model=RewardModelSettings(disagreement=0.44),
    max_new_tokens=16,
)


def config_of(out: Path, **keys: object) -> DemoConfig:
    wanted = {"out": out, "settings": SMALL, "until": "reward_model", "resume": True, **keys}
    return DemoConfig.model_validate(wanted)


def start(config: DemoConfig, folder: Path) -> subprocess.Popen[str]:
    """As the Job does: a file from a ConfigMap."""
    path = folder / "demo.json"
    save_config(config, path)
    command = [sys.executable, "-m", "kleash.cli", "demo", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def copy_before(demo: Path, out: Path, stage: StageName) -> None:
    """As if the demo had been ended before ``stage``."""
    shutil.copytree(demo, out)
    names: list[StageName] = list(RESULTS)
    for name in names[names.index(stage) :]:
        result = out / RESULTS[name]
        shutil.rmtree(result) if result.is_dir() else result.unlink(missing_ok=True)
    if stage == "base":
        shutil.rmtree(out / "base-untrained")


def digests(out: Path) -> dict[str, str]:
    return {
        name: json.loads((out / name / "kleash.json").read_text())["digest"]
        for name in ("base", "sft", "reward-model")
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo that ran through to its reward model."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(config_of(folder / "demo", run_id="a-run"), folder)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert printed.splitlines()[0] == "demo: complete up to reward_model"
    assert printed.splitlines()[-1].split() == [
        "reward_model", str(folder / "demo" / "reward-model"),
    ]  # fmt: skip
    return folder / "demo"


def test_everything_up_to_the_stage_is_there(undisturbed: Path) -> None:
    missing = [name for name, result in RESULTS.items() if not (undisturbed / result).exists()]
    assert missing == ["ppo"]
    for model in ("sft", "reward-model"):
        assert missing_parts(undisturbed / model, needs_lineage=True) == []
        assert json.loads((undisturbed / model / "kleash.json").read_text())["run_id"] == "a-run"


def test_a_second_job_does_nothing(undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    assert Demo(config_of(undisturbed), NullProgress()).run() is None
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


@pytest.mark.parametrize(
    ("begin", "seen", "number"),
    [
        ("base", "base-untrained", signal.SIGKILL),
        ("sft", "sft", signal.SIGTERM),
        ("sft", "data/candidates.jsonl", signal.SIGKILL),
    ],
)
def test_a_killed_pod_goes_on_with_the_next_stage(
    undisturbed: Path, tmp_path: Path, begin: StageName, seen: str, number: signal.Signals
) -> None:
    """What is complete stays the same file: pods that wait for it may have it open by now."""
    out = tmp_path / "demo"
    copy_before(undisturbed, out, begin)
    config = config_of(out, run_id="a-run")
    process = start(config, tmp_path)
    while not (out / seen).exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    inodes: dict[StageName, int] = {
        name: (out / result).stat().st_ino
        for name, result in RESULTS.items()
        if (out / result).exists()
    }
    assert "reward_model" not in inodes

    second = start(config, tmp_path)
    _, errors = second.communicate()
    assert second.returncode == 0, errors
    assert all((out / RESULTS[name]).stat().st_ino == inode for name, inode in inodes.items())
    assert digests(out) == digests(undisturbed)
    # Nothing of the first pod is left, however often this goes on.
    left = {path.name for path in out.rglob("*")}
    assert left == {path.name for path in undisturbed.rglob("*")}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".demo.lock", "demo", "demo.json"]


def test_the_next_pod_waits_for_one_that_is_being_ended(undisturbed: Path) -> None:
    lock = take_lock(undisturbed.with_name(".demo.lock"))
    with pytest.raises(
        ConfigError, match=rf"a demo works in .* already \(process {os.getpid()} on"
    ):
        Demo(config_of(undisturbed, resume=False), NullProgress()).run()
    process = start(config_of(undisturbed), undisturbed.parent)
    assert process.stderr is not None
    assert "waiting for the demo that works in" in process.stderr.readline()
    os.close(lock)
    process.communicate()
    assert process.returncode == 0


def test_another_demo_is_not_resumed(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"was started with seed 0, not 1; set it back to resume"):
        Demo(config_of(undisturbed, seed=1), NullProgress()).run()
    wider = SMALL.model_copy(update={"max_new_tokens": 9})
    with pytest.raises(ConfigError, match=r"with settings\.max_new_tokens 16, not 9"):
        Demo(config_of(undisturbed, settings=wider), NullProgress()).run()
    (tmp_path / "something").touch()
    with pytest.raises(ConfigError, match="holds no demo that can be resumed"):
        Demo(config_of(tmp_path), NullProgress()).run()
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_an_empty_folder_is_used_as_it_is(tmp_path: Path) -> None:
    """A volume that is mounted there cannot be moved aside."""
    out = tmp_path / "mounted"
    out.mkdir()
    inode = out.stat().st_ino
    with demo_folder(config_of(out, resume=False)):
        assert out.stat().st_ino == inode
    assert (out / "demo.json").exists()


def test_without_resume_a_run_before_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    for _ in range(3):
        if out.exists():
            move_aside(out)
        out.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "demo-1", "demo-2"]
