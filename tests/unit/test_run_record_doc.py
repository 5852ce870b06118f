"""docs/run-record.md: its commands run, its tables leave nothing out."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.run_folders import write_run

from kleash.base.config import describe_config, load_config
from kleash.cli.main import main
from kleash.ppo.config import PPOConfig
from kleash.ppo.environment import describe_start
from kleash.ppo.run_folder import RunFolder
from kleash.sinks.config import NAMES
from kleash.up.config import UpConfig

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "run-record.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    for line in block.replace("\\\n", " ").splitlines()
]


def commands(start: str) -> list[list[str]]:
    found = [shlex.split(line) for line in COMMANDS if line.startswith(start)]
    assert found, start
    return found


def test_no_command_is_left_untested() -> None:
    starts = ("pip install", "kleash up", "kleash report", "tensorboard --logdir=")
    assert [line for line in COMMANDS if not line.startswith(starts)] == []


def test_report_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine/ppo", *(f"beta-{b}-seed-{s}" for b in (0.1, 0.01) for s in (0, 1))):
        write_run(tmp_path / "runs" / name, {"score_mean": [0.0, 1.0]})
    for command in commands("kleash report"):
        words = [
            str(path)
            for word in command[1:]
            for path in (sorted(Path().glob(word)) if "*" in word else [word])
        ]
        assert main(words) == 0
    assert (tmp_path / "runs" / "mine" / "ppo" / "run-report.html").exists()
    assert "<h1>Two leashes</h1>" in (tmp_path / "leashes.html").read_text()


def test_sinks_command_and_keys() -> None:
    (command,) = commands("kleash up")
    assert load_config(UpConfig, command[2:]).ppo.sinks.use == ("tensorboard",)
    keys = {key for key, *_ in describe_config(PPOConfig)}
    named = {key.partition("=")[0] for key in re.findall(r"`-{0,2}(sinks\.[a-z_.]+)", TEXT)}
    assert named <= keys
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(NAMES) <= extras.keys()
    rows = re.findall(r"^\| \w[\w&]+ \| `(\w+)` \|", TEXT, re.MULTILINE)
    assert tuple(rows) == NAMES


def test_every_key_of_environment_json_is_explained(world: World, tmp_path: Path) -> None:
    entry = describe_start(world.config(tmp_path), from_step=0, seen_step=0, digests={}, lineage={})
    _, _, section = TEXT.partition("### `environment.json`")
    rows = re.findall(r"^\| (`.+?`) \|", section.partition("\n## ")[0], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(entry)
    folder = RunFolder(tmp_path)
    folder.add_start(entry)
    assert folder.read_starts() == [entry]


def test_pictures_and_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)", TEXT)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
