"""The commands of docs/live-view.md do what it says, and its tables leave nothing out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.services.doubler import free_port
from tests.services.live_run import LiveRun, serving_run

from kleash.ppo.config import PPOConfig
from kleash.ppo.http import API

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "live-view.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
WATCH, TRAINER, HTTP = (block.splitlines() for block in BLOCKS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``runs/mine/ppo`` is in it."""
    (tmp_path / "runs" / "mine" / "ppo").mkdir(parents=True)
    return tmp_path


def do(command: str, folder: Path, places: dict[str, str]) -> str:
    for place, actual in places.items():
        command = command.replace(place, actual)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def note(folder: Path, address: str) -> None:
    noted = {"run_id": "a-run", "address": address, "page": ""}
    (folder / "runs" / "mine" / "ppo" / "trainer.json").write_text(json.dumps(noted))


def test_a_run_that_is_over_is_watched_to_its_end(folder: Path) -> None:
    run = LiveRun(step=3, total_steps=3)
    with serving_run(run) as server:
        note(folder, server.address)
        for command in WATCH:
            told = do(command, folder, {"127.0.0.1:50054": server.address})
            assert "complete: all 3 steps are done" in told, command
    assert len(WATCH) == 3


def test_orders(folder: Path) -> None:
    run = LiveRun()
    with serving_run(run) as server:
        note(folder, server.address)
        told = [do(command, folder, {}) for command in TRAINER[:3]]
        assert [each.split(" at ")[0] for each in told] == [
            "a-run: running",
            "paused after step 3 of 1000\n",
            "running",
        ]
        run.control.pause()
        run.advance(2)
        assert "/runs/a/checkpoints/step-000004" in do(TRAINER[3], folder, {})
        assert do(TRAINER[4], folder, {}).startswith("stopping after step 4")
        run.end()
    assert len(TRAINER) == 5


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_http(folder: Path) -> None:
    run, port = LiveRun(), free_port()
    places = {"localhost:8080": f"127.0.0.1:{port}"}
    with serving_run(run, http_port=port):
        *calls, stream = HTTP
        told = [json.loads(do(command, folder, places)) for command in calls[:4]]
        assert told[0]["run_id"] == "a-run"
        assert told[1]["samples"]
        assert told[2] == {"state": "RUN_STATE_PAUSED"}
        run.control.pause()
        run.advance()
        assert json.loads(do(calls[4], folder, places))["path"].startswith("/runs/a/checkpoints/")
        run.end()
        events = do(stream, folder, places)
    assert re.findall(r"^id: (\d+)$", events, re.MULTILINE)[:3] == ["1", "2", "3"]
    assert events.endswith("event: end\ndata: {}\n\n")


def test_every_path_and_key_is_named() -> None:
    for route in API.routes:
        assert f"`{route.verb} {route.path}" in TEXT
    for name in ("http_port", "port", "max_request_s", "auth"):
        assert name in PPOConfig.model_fields["server"].annotation.model_fields  # pyright: ignore
        assert f"server.{name}" in TEXT
    for name in re.findall(r"!\[[^]]*\]\((\S+)\)|(?:src|srcset)=\"(\S+)\"", TEXT):
        assert (ROOT / "docs" / "".join(name)).is_file(), name
