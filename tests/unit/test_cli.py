"""The command line: help is light, errors are one sentence with a status."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kleash.cli.main import COMMANDS, main
from kleash.client import TrainerClient
from kleash.policy.config import PolicyConfig
from kleash.policy.service import PolicyService
from kleash.reference.config import ReferenceConfig
from kleash.reference.service import ReferenceService
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.rpc.server import BackgroundServer
from kleash.up.supervisor import free_port

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kleash.cli.main import main; main(['--help']);"
        "heavy = {'torch', 'transformers', 'pydantic', 'grpc', 'numpy', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_command_help_shows_keys_without_torch(command: str) -> None:
    code = (
        f"import sys; from kleash.cli.main import main; status = main([{command!r}, '--help']);"
        "sys.exit('torch was imported' if 'torch' in sys.modules else status)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "--" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["traim"], "unknown command 'traim'"),
        (
            ["sft", "--model=x", "--data=y", "--out=z", "--learning_rat=1"],
            "unknown key 'learning_rat'; did you mean 'learning_rate'?",
        ),
        (["sft", "--data=y", "--out=z"], "'model' is required"),
        (["sft", "nowhere.toml"], "cannot read the configuration file nowhere.toml"),
        (["serve"], "name at least one service"),
        (["serve", "reward"], "the reward service has no configuration; set --reward.model=FOLDER"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["ppo", "--help"]])
def test_a_reader_that_has_left_is_no_error(arguments: list[str]) -> None:
    """As in ``kleash ppo --help | head -1``."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kleash.cli", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def address(world: World) -> Iterator[str]:
    """All three services in one server."""
    services = [
        PolicyService(PolicyConfig(model=world.model)),
        RewardService(RewardConfig(model=world.reward_model)),
        ReferenceService(ReferenceConfig(model=world.model)),
    ]
    with BackgroundServer(services) as server:
        yield server.address


def ppo(world: World, address: str, out: Path, *more: str) -> list[str]:
    return [
        "ppo",
        f"--model={world.model}",
        f"--reward_model={world.reward_model}",
        f"--prompts={world.prompts}",
        f"--out={out}",
        f"--services.policy={address}",
        f"--services.reward={address}",
        f"--services.reference={address}",
        "--batch_size=4",
        "--max_prompt_tokens=40",
        "--sampling.max_new_tokens=4",
        *more,
    ]


@pytest.fixture
def _own_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command configures the root logger; the next test gets it back as it was."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)


@pytest.mark.usefixtures("_own_logging")
def test_ppo_says_done_at_the_end(
    world: World, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(ppo(world, address, out, "--total_steps=1")) == 0
    assert capsys.readouterr().out == f"ppo: done, {out}\n"


@pytest.mark.usefixtures("_own_logging")
def test_ppo_that_was_stopped_says_where_and_how_it_goes_on(
    world: World, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, port = tmp_path / "run", free_port()

    def stop_after_a_step() -> None:
        with TrainerClient(f"127.0.0.1:{port}") as trainer:
            next(trainer.watch_steps(from_step=1))
            trainer.stop()

    stopper = threading.Thread(target=stop_after_a_step)
    stopper.start()
    arguments = ppo(world, address, out, "--total_steps=5000", f"--server.port={port}")
    assert main(arguments) == 0
    stopper.join()
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    printed = capsys.readouterr().out
    assert printed == f"ppo: stopped after step {steps} of 5000; --resume goes on\n"


@pytest.mark.usefixtures("_own_logging")
def test_a_stage_of_a_run_that_is_done_is_not_done_again(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Job may start a pod once too often; another configuration is an error as ever."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "hello", "completion": "world"}\n' * 8)
    out = tmp_path / "out"
    arguments = ["sft", f"--model={tiny_folder}", f"--data={data}", f"--out={out}"]
    arguments += ["--max_tokens=64", "--batch_size=4", "--num_threads=1"]
    assert main([*arguments, "--run_id=mine"]) == 0
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert main([*arguments, "--run_id=mine"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"sft: done already, {out}"
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert main([*arguments, "--run_id=another"]) == 2
    assert main([*arguments, "--run_id=mine", "--learning_rate=1e-4"]) == 2
    assert main(arguments) == 2
    assert f"{out} exists already" in capsys.readouterr().err
