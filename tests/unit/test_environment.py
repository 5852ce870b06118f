"""environment.json: what each start of a run was computed with, without secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch
from tests.unit.test_ppo_resume import stop_after

from kleash.ppo.control import Control
from kleash.ppo.environment import source_revision, without_secrets
from kleash.ppo.randomness import sampling_seed
from kleash.ppo.train import train

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit


def starts(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "environment.json").read_text())


def test_every_start_has_an_entry(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins at the checkpoint, and knows what was done beyond it before."""
    monkeypatch.setattr(sys, "argv", ["kleash", "ppo", "--api_token=secret"])
    monkeypatch.setenv("A_TOKEN", "secret")
    out, control = tmp_path / "run", Control()
    stop_after(control, 1)
    train(world.config(out, total_steps=3, seed=7), world.services(), control=control)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "step_s": 1.0}\n')
    report = train(
        world.config(out, total_steps=3, seed=7, resume=True), world.services(), control=Control()
    )
    first, second = starts(out)
    assert (first["from_step"], first["seen_step"]) == (0, 0)
    assert (second["from_step"], second["seen_step"]) == (1, 2)
    assert first["software"]["torch"] == torch.__version__
    assert first["software"]["grpcio"] == grpc.__version__
    assert first["machine"]["threads"] == torch.get_num_threads()
    assert first["machine"]["device"] == "cpu"
    assert first["seeds"]["prompts"] == 7
    assert first["seeds"]["sampling_step_1"] == sampling_seed(7, 1)
    assert first["seeds"]["sampling_evaluation"] == sampling_seed(7, 0)
    assert first["digests"] == {
        key: value for key, value in report.digests.items() if key != "policy"
    }
    assert "secret" not in (out / "environment.json").read_text()


def test_secrets_on_the_command_line_are_hidden() -> None:
    command = (
        "kleash ppo --api-token=abc --x.secret abc --password=abc --sinks.mlflow.tracking_uri="
        "http://me:abc@host/x --max-prompt-tokens 3 --pad-token=<pad> --server.auth.tokens_file=/a"
    )
    assert " ".join(without_secrets(command.split())) == (
        "kleash ppo --api-token=*** --x.secret *** --password=*** --sinks.mlflow.tracking_uri="
        "http://***@host/x --max-prompt-tokens 3 --pad-token=<pad> --server.auth.tokens_file=/a"
    )


def test_revision_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "tracked.py").write_text("1")
    git("add", "tracked.py")
    git("commit", "--quiet", "--message=first")
    revision = git("rev-parse", "HEAD")
    assert source_revision(tmp_path / "tracked.py") == revision
    (tmp_path / "tracked.py").write_text("2")
    assert source_revision(tmp_path / "tracked.py") == f"{revision}+changes"
    # An installed package in a virtual environment that lies in a checkout is none of it.
    (tmp_path / "installed.py").write_text("3")
    assert source_revision(tmp_path / "installed.py") is None
