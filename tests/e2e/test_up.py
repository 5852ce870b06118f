"""``kleash up`` with real processes: runs, survives a killed service, stops cleanly, resumes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

STARTED = re.compile(r"(policy|reward|reference) started, pid (\d+)")


def _start(
    tiny_folder: Path, tiny_reward_folder: Path, root: Path, *more: str
) -> subprocess.Popen[bytes]:
    prompts = root / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"What is {n} plus 4?"}) + "\n" for n in range(16))
    )
    command = [
        sys.executable,
        "-m",
        "kleash.cli",
        "up",
        f"--ppo.model={tiny_folder}",
        f"--ppo.reward_model={tiny_reward_folder}",
        f"--ppo.prompts={prompts}",
        f"--ppo.out={root / 'run'}",
        "--ppo.sampling.max_new_tokens=8",
        "--ppo.batch_size=4",
        "--ppo.max_prompt_tokens=64",
        "--service_threads=1",
        "--ppo.num_threads=1",
        "--ppo.checkpoint.every=1000",
        *more,
    ]
    with (root / "up.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _steps(root: Path) -> list[dict]:
    path = root / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _wait(
    condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "kleash up ended early"
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _pids(root: Path) -> dict[str, int]:
    """Newest process of every service."""
    return {name: int(pid) for name, pid in STARTED.findall((root / "up.log").read_text())}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_killed_service_is_restarted_and_the_run_completes(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path: Path
) -> None:
    process = _start(tiny_folder, tiny_reward_folder, tmp_path, "--ppo.total_steps=12")
    _wait(lambda: len(_steps(tmp_path)) >= 2, process)
    first = _pids(tmp_path)
    os.kill(first["reward"], signal.SIGKILL)
    os.kill(first["policy"], signal.SIGKILL)
    assert process.wait(200) == 0, (tmp_path / "up.log").read_text()
    second = _pids(tmp_path)
    assert second["reward"] != first["reward"]
    assert second["policy"] != first["policy"]
    assert second["reference"] == first["reference"]
    steps = _steps(tmp_path)
    assert [row["step"] for row in steps] == list(range(1, 13))
    # The restarted policy began with the weights of version 0 and was given the trainer's again.
    assert max(row["behaviour_gap_max"] for row in steps) < 1e-4
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()
    assert not any(_is_alive(pid) for pid in (*first.values(), *second.values()))


def test_interrupt_leaves_a_checkpoint_and_no_process(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path: Path
) -> None:
    process = _start(tiny_folder, tiny_reward_folder, tmp_path, "--ppo.total_steps=1000")
    _wait(lambda: len(_steps(tmp_path)) >= 2, process)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    steps = len(_steps(tmp_path))
    assert 2 <= steps < 1000
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        f"step-{steps:06d}"
    ]
    assert not any(_is_alive(pid) for pid in _pids(tmp_path).values())


def test_a_service_that_cannot_start_ends_the_run(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path: Path
) -> None:
    process = _start(
        tiny_folder,
        tiny_reward_folder,
        tmp_path,
        "--ppo.total_steps=1",
        "--reward.limits.max_item_tokens=100000",
    )
    assert process.wait(120) == 1
    log = (tmp_path / "up.log").read_text()
    assert "the reward service ended with status 2" in log
    assert "max_item_tokens" in log
    assert not any(_is_alive(pid) for pid in _pids(tmp_path).values())
