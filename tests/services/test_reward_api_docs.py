"""docs/reward-api.md: its examples run against the server that its quick start begins, and its
tables leave nothing out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from tests.services.doubler import free_port

from kleash.base.config import describe_config
from kleash.client import RewardClient, reward_settings
from kleash.client.reward_messages import ScoreKeywords
from kleash.common.v1 import common_pb2
from kleash.reward.config import RewardConfig
from kleash.rpc import errors
from kleash.rpc.server import ServerConfig

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reward-api.md").read_text(encoding="utf-8")
ADDRESS, GATEWAY = "127.0.0.1:50052", "127.0.0.1:8080"
SERVER_KEYS = {key for key, *_ in describe_config(ServerConfig)}


def blocks(language: str) -> list[str]:
    """The examples whose fence says ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Served:
    """The quick start's server."""

    folder: Path
    """Where its command ran."""
    port: int
    http_port: int
    """Of its gateway."""

    def run(self, command: list[str], folder: Path | None = None) -> str:
        """Output of an example, which must end well."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "KLEASH_REWARD_ADDRESS": f"127.0.0.1:{self.port}",
            "PYTHONWARNINGS": "error",
        }
        places = {ADDRESS: f"127.0.0.1:{self.port}", GATEWAY: f"127.0.0.1:{self.http_port}"}
        for place, actual in places.items():
            command = [part.replace(place, actual) for part in command]
        done = subprocess.run(
            command,
            cwd=folder or self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def served(tiny_reward_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "models").mkdir()
    shutil.copytree(tiny_reward_folder, folder / "models" / "reward")
    port = free_port()
    (command,) = blocks("sh server")
    assert command.startswith("kleash serve reward ")
    arguments = command.replace("=50052", f"={port}").split()[1:]
    http_port = free_port()
    arguments.append(f"--server.http_port={http_port}")
    with subprocess.Popen([sys.executable, "-m", "kleash.cli", *arguments], cwd=folder) as server:
        with RewardClient(f"127.0.0.1:{port}", timeout_s=1) as reward:
            while server.poll() is None:
                try:
                    reward.get_model()
                    break
                except (errors.Unavailable, errors.DeadlineExceeded):
                    continue
        assert server.poll() is None, "the server did not start"
        yield Served(folder, port, http_port)
        server.terminate()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_examples_run(served: Served, number: int) -> None:
    assert served.run([sys.executable, "-c", blocks("python")[number]])


def test_python_examples_say_what_the_text_says(served: Served) -> None:
    outputs = [served.run([sys.executable, "-c", code]) for code in blocks("python")]
    assert len(outputs) == 5
    assert "('INPUT_TOO_LONG', " in outputs[1]
    assert len(outputs[2].splitlines()) == 101
    assert "TOKENIZER_MISMATCH" in outputs[3]
    assert "REVISION_NOT_SERVED" in outputs[4]


def test_shell_examples_run(served: Served, tmp_path: Path) -> None:
    """A reader types them one after the other, in one folder."""
    for code in blocks("sh"):
        assert served.run(["bash", "-eu", "-c", code], tmp_path)
    lines = (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["id"] for record in records] == ["a", "b", "c", "d"]
    assert {record["code"] for record in records} == {"OK"}
    assert sorted(records[3]["ranking"]) == [0, 1, 2]
    fields = set().union(*records, {"components", "uncertainty", "truncated", "error"})
    section = TEXT.partition("## Shell")[2].partition("## Any gRPC")[0]
    assert fields <= set(re.findall(r"`([a-z_]+)`", section))


def test_curl_examples_run(served: Served) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on PATH")
    (code,) = blocks("sh gateway")
    printed = served.run(["bash", "-eu", "-c", code.replace("curl -sS", "curl -sS --fail")])
    for key in ("item_id", "revision", "models"):
        assert f'"{key}"' in printed


def test_buf_examples_run(served: Served) -> None:
    if shutil.which("buf", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("there is no buf in this environment; pip install buf-bin")
    (code,) = blocks("sh buf")
    printed = served.run(["bash", "-eu", "-c", code])
    assert "kleash.reward.v1.RewardService/ScoreStream" in printed
    assert '"itemId": "a"' in printed
    assert '"maxItems"' in printed


def test_names_are_those_of_the_code() -> None:
    reward_keys = {key for key, *_ in describe_config(RewardConfig)}
    named = set(re.findall(r"`(server|reward)\.([a-z_.]+)`", TEXT))
    unknown = {
        f"{section}.{key}"
        for section, key in named
        if key not in (SERVER_KEYS if section == "server" else reward_keys)
        and not any(known.startswith(f"{key}.") for known in SERVER_KEYS)
    }
    assert not unknown
    methods = set(re.findall(r"^\| `(\w+)\(", TEXT, re.MULTILINE)) | {"list_models"}
    public = {
        name
        for name in dir(RewardClient)
        if not name.startswith("_") and name not in ("close", "from_env")
    }
    assert methods == public
    assert set(re.findall(r"^\| `(\w+)` \| `\w+=", TEXT, re.MULTILINE)) == set(
        ScoreKeywords.__annotations__
    )
    source = Path(reward_settings.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r"KLEASH_REWARD_[A-Z_]+", TEXT)) == set(
        re.findall(r'"(KLEASH_REWARD_[A-Z_]+)"', source)
    )


def test_tables_of_codes_are_complete() -> None:
    codes = {
        name.removeprefix("ITEM_STATUS_CODE_")
        for name in common_pb2.ItemStatusCode.keys()  # noqa: SIM118, an enum of protobuf
    } - {"UNSPECIFIED"}
    section = TEXT.partition("## What comes back")[2].partition("## Limits")[0]
    assert set(re.findall(r"^\| `([A-Z_]+)`", section, re.MULTILINE)) == codes
    limits = TEXT.partition("## Limits")[2].partition("## Errors")[0]
    assert set(re.findall(r"^\| `(\w+)`", limits, re.MULTILINE)) == {
        field.name for field in common_pb2.Limits.DESCRIPTOR.fields
    }
    table = TEXT.partition("## Errors")[2].partition("## Deadlines")[0]
    rows = dict(re.findall(r"^\| ([A-Z_]+) \| `(\w+)`", table, re.MULTILINE))
    known = {each.code.name: each.__name__ for each in errors._NAMED}
    del known[grpc.StatusCode.CANCELLED.name]  # what callers do themselves
    assert rows == known


@pytest.mark.skipif(shutil.which("gofmt") is None, reason="there is no gofmt on PATH")
def test_the_go_example_is_formatted_go(tmp_path: Path) -> None:
    (code,) = blocks("go")
    path = tmp_path / "main.go"
    path.write_text(code, encoding="utf-8")
    done = subprocess.run(["gofmt", "-l", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_go_example_uses_names_of_the_contract() -> None:
    """Go's names of what the contract has: a field that is renamed there must change here."""
    (code,) = blocks("go")
    proto = "".join(path.read_text() for path in (ROOT / "protos").rglob("*.proto"))
    for name in ("ScoreRequest", "ScoreItem", "ScoreOptions", "Conversation", "Message"):
        assert f"&rewardv1.{name}" in code or f"commonv1.{name}" in code
        assert f"message {name} " in proto
    go_fields = set(re.findall(r"\b(?:result|reply|reply\.Model)\.([A-Z]\w+)", code))
    fields = {
        "".join(part.title() for part in name.split("_"))
        for name in re.findall(r"\b([a-z_0-9]+) = \d+", proto)
    }
    assert go_fields
    assert go_fields <= fields
