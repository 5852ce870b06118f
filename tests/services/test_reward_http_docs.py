"""The commands of docs/reward-http.md do what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.services.doubler import CALL_S
from tests.services.http_client import HttpPort, serving_reward

from kleash.reward.http import API
from kleash.rpc.http_answer import _FINER, _STATUSES

pytestmark = pytest.mark.services

TEXT = (Path(__file__).parents[2] / "docs" / "reward-http.md").read_text(encoding="utf-8")
COMMANDS = [block for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) if "curl" in block]


@pytest.fixture(scope="module")
def port(tiny_reward_folder: Path) -> Iterator[HttpPort]:
    with serving_reward(tiny_reward_folder) as (_, port):
        yield port


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_answered(port: HttpPort, command: str) -> None:
    command = command.replace("localhost:8080", f"127.0.0.1:{port.port}")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        timeout=CALL_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == (3 if "score_stream" in command else 1)
    assert all("error" not in line for line in lines)


def test_every_path_and_status_is_named() -> None:
    assert len(COMMANDS) == 5
    for route in API.routes:
        assert f"`{route.verb} {route.path}" in TEXT
    for status in {*_STATUSES.values(), *_FINER.values()} - {200}:
        assert re.search(rf"^\|.*\b{status}\b", TEXT, re.MULTILINE), status
