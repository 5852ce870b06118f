"""A step of a run over gRPC is replayed by a process of its own: the commands of docs/replay.md."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kleash.up.supervisor import kleash_command

if TYPE_CHECKING:
    from conftest import Cluster

pytestmark = pytest.mark.e2e

DOC = Path(__file__).parents[2] / "docs" / "replay.md"


def commands() -> list[list[str]]:
    """Those of the page, without "kleash"."""
    block = re.search(r"```sh\n(.+?)```", DOC.read_text(), re.DOTALL)
    assert block is not None
    lines = [line.split() for line in block[1].splitlines()]
    assert all(line[0] == "kleash" for line in lines)
    return [line[1:] for line in lines]


def test_the_commands_of_the_page(cluster: Cluster, tmp_path: Path) -> None:
    record, newest, other_model, other_service = commands()
    assert record == ["ppo", "ppo.toml", "--record.every=10"]
    out = tmp_path / "run"
    trainer = cluster.trainer(cluster.config(out, total_steps=2), "--record.every=2")
    assert trainer.end() == 0, trainer.log.read_text()

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        known = {
            "runs/ppo": str(out),
            "--step=20": "--step=2",
            "--reward_model=runs/rm-2": f"--reward_model={cluster.reward_model}",
            "--reward=127.0.0.1:50052": f"--reward={cluster.processes['reward'].address}",
        }
        words = kleash_command(*(known.get(word, word) for word in command))
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)

    # Nothing of the run but the recording is needed.
    for name in ("checkpoints", "policy", "weights"):
        shutil.rmtree(out / name)
    done = run(newest)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "figures and the digests of both models after the update are those" in done.stdout
    assert "with reward model" not in done.stdout

    done = run(other_model)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "correlation 1.000, of ranks 1.000" in done.stdout

    done = run(other_service)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["is_identical"] is True
    assert found["other_reward_model"]["figures"] == []
