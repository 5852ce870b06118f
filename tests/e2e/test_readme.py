"""README.md, followed to the letter: its commands are run, not copied.

The test adds only what makes a run small (sizes, threads), free ports, and the files that a user
would bring. A block that is none of those known here fails the test: somebody must decide how it is
tested.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kleash.cli.main import COMMANDS
from kleash.lm.tiny import write_tiny_folder
from kleash.up.supervisor import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALL = {
    "sft": "--batch_size=4 --num_threads=1",
    "candidates": "--max_new_tokens=8 --num_threads=1",
    "reward-model": "--batch_size=4 --num_threads=1",
    "up": "--ppo.total_steps=2 --ppo.batch_size=4 --ppo.sampling.max_new_tokens=8 "
    "--ppo.num_threads=1 --service_threads=1",
    "serve": "--num_threads=1",
    "weights": "",
    "ppo": "--total_steps=2 --batch_size=4 --sampling.max_new_tokens=8 --num_threads=1",
}
QUESTIONS = [f"What is {number} plus 4?" for number in range(8)]
COMMAND_S = 240.0


def blocks(language: str) -> list[str]:
    """Fenced code blocks of README.md."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """Commands of a shell block; a line that ends in a backslash goes on in the next."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def argument(command: str, name: str) -> str:
    """The value of --name=value, or of --section.name=value."""
    values = [
        word.partition("=")[2]
        for word in shlex.split(command, comments=True)
        if re.match(rf"--(\w+\.)?{name}=", word)
    ]
    assert len(values) == 1, f"{name} is given {len(values)} times in: {command}"
    return values[0]


def write_lines(path: Path, records: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@dataclass(frozen=True)
class Running:
    """A process and the file that has its output."""

    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class Workplace:
    """An empty folder in which a user follows README.md."""

    folder: Path
    ports: dict[str, str] = field(default_factory=dict)
    """Ports of README.md and those used instead."""

    def with_free_ports(self, text: str) -> str:
        for port in re.findall(r"\b5005\d\b", text):
            self.ports.setdefault(port, str(free_port()))
        return re.sub(r"\b5005\d\b", lambda match: self.ports[match[0]], text)

    def start(self, command: str) -> Running:
        """Start a command as it is printed, made small."""
        words = shlex.split(command, comments=True)
        assert words[0] == "kleash", command
        command = self.with_free_ports(command.partition(" #")[0])
        log = self.folder / f"{'-'.join(words[1:3]).replace('/', '_')}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {command.strip()} {SMALL[words[1]]}"],
                cwd=self.folder,
                env={
                    **os.environ,
                    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                    "OMP_NUM_THREADS": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return Running(process, log)

    def run(self, command: str) -> None:
        """Run a command to its end; it must succeed and leave what it was told to write."""
        self.read(command)
        assert (self.folder / argument(command, "out")).exists(), command

    def read(self, command: str) -> str:
        """Run a command to its end; it must succeed. Returns what it printed."""
        running = self.start(command)
        try:
            status = running.process.wait(timeout=COMMAND_S)
        finally:
            running.process.kill()
        assert status == 0, f"{command}\n{running.log.read_text()}"
        return running.log.read_text()

    def bring(self, command: str) -> None:
        """Files that a user has before the command: base model, data, comparisons."""
        match shlex.split(command)[1]:
            case "sft":
                # Long enough for the default max_prompt_tokens.
                model = self.folder / argument(command, "model")
                write_tiny_folder(model, "llama", [*QUESTIONS, "It is 7."], max_positions=1024)
                write_lines(
                    self.folder / argument(command, "data"),
                    [{"prompt": question, "completion": " It is 7."} for question in QUESTIONS],
                )
            case "candidates":
                write_lines(
                    self.folder / argument(command, "data"),
                    [{"prompt": question} for question in QUESTIONS],
                )
                self.candidates = self.folder / argument(command, "out")
            case "reward-model":
                lines = self.candidates.read_text(encoding="utf-8").splitlines()
                answered = [json.loads(line) for line in lines]
                write_lines(
                    self.folder / argument(command, "data"),
                    [
                        {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
                        for row in answered
                        for chosen, rejected, *_ in [sorted(row["responses"], key=len)]
                    ],
                )
                self.reward_model = self.folder / argument(command, "out")


def test_every_block_is_known() -> None:
    """make, the stages and PPO, the services, their weights, a cluster; Python that calls them.

    Commands for a cluster are tested in tests/k8s/test_docs.py.
    """
    first_words = [[command.split()[0] for command in commands(block)] for block in blocks("sh")]
    assert [set(words) for words in first_words] == [
        {"make"},
        {"kleash"},
        {"kleash"},
        {"kleash"},
        {"helm", "kleash"},
    ]
    assert len(blocks("python")) == 1
    assert len(re.findall(r"^```\w+$", README, flags=re.MULTILINE)) == 6


def test_make_targets_exist() -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    named = re.findall(r"`make ([\w-]+)`", README)
    printed = [command.split()[1] for command in commands(blocks("sh")[0])]
    assert len(printed) == 2
    for target in {*named, *printed}:
        done = subprocess.run(
            [make, "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_commands_links_and_paths_exist() -> None:
    named = set(re.findall(r"`kleash ([a-z][\w-]*)", README))
    assert named <= COMMANDS.keys()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) >= 3
    paths = re.findall(r"`((?:protos|services|trainer|tests|benchmarks|docs)/[^`]*)`", README)
    assert len(paths) >= 8
    assert [path for path in (*links, *paths) if not (ROOT / path).exists()] == []


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A user's folder after "Your own model and data"."""
    workplace = Workplace(tmp_path_factory.mktemp("readme"))
    for command in commands(blocks("sh")[1]):
        workplace.bring(command)
        workplace.run(command)
    return workplace


def test_own_model_and_data(workplace: Workplace) -> None:
    names = [shlex.split(command)[1] for command in commands(blocks("sh")[1])]
    assert names == ["sft", "candidates", "reward-model", "up"]
    out = workplace.folder / argument(commands(blocks("sh")[1])[-1], "out")
    assert json.loads((out / "report.json").read_text())["is_complete"]
    assert (out / "policy" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def services(workplace: Workplace) -> Iterator[None]:
    """The services of "The services alone", ready; ended with SIGTERM."""
    started: list[Running] = []
    try:
        for command in commands(blocks("sh")[2]):
            if shlex.split(command)[1] == "serve":
                started.append(workplace.start(command))
                wait_until_serving(started[-1], workplace.ports[argument(command, "port")])
        assert len(started) == 3
        yield
    finally:
        for running in started:
            running.process.send_signal(signal.SIGTERM)
        statuses = [running.process.wait(timeout=COMMAND_S) for running in started]
    assert statuses == [0, 0, 0], [running.log.read_text() for running in started]


def wait_until_serving(running: Running, port: str) -> None:
    deadline = time.monotonic() + COMMAND_S
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while True:
            assert running.process.poll() is None, running.log.read_text()
            assert time.monotonic() < deadline, f"nothing serves on port {port}"
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                answer = None
            if answer is not None and answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            time.sleep(0.1)


def test_services_alone(workplace: Workplace, services: None) -> None:
    trainers = [c for c in commands(blocks("sh")[2]) if shlex.split(c)[1] == "ppo"]
    assert len(trainers) == 1
    workplace.run(trainers[0])
    out = workplace.folder / argument(trainers[0], "out")
    assert json.loads((out / "report.json").read_text())["is_complete"]


def test_weights(workplace: Workplace, services: None) -> None:
    """A replica, the versions of a run, and every hash of them."""
    inspect, history, verify = map(workplace.read, commands(blocks("sh")[3]))
    assert "version" in inspect
    out = workplace.folder / shlex.split(commands(blocks("sh")[3])[1])[3]
    committed = [
        json.loads(line)["version"]
        for line in (out / "weights" / "log.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "committed"
    ]
    assert committed == [1, 2, 3]
    assert history.count("committed") == 3
    assert verify


def test_application(workplace: Workplace, services: None) -> None:
    """It prints a score and the reward model's revision for each text, and never loads torch."""
    code = workplace.with_free_ports(blocks("python")[0])
    code += "\nimport sys\nassert not {'torch', 'pydantic'} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    digest = json.loads((workplace.reward_model / "report.json").read_text())["digest"]
    printed = [line.split() for line in done.stdout.splitlines()]
    assert [revision for _, revision in printed] == [digest, digest]
    scores = [float(score) for score, _ in printed]
    assert all(math.isfinite(score) for score in scores)
    assert scores[0] != scores[1]
