"""The command line: help is light, errors are one sentence with a status."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kleash.cli.main import COMMANDS, main

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
