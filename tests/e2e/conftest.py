"""Shared by end-to-end tests of PPO: real service processes on loopback, tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.warm import WarmProcess

from kleash.ppo.config import PPOConfig
from kleash.ppo.services import Services, connect
from kleash.up.supervisor import free_port, kleash_command

PROMPTS = (
    "<|user|>What is 3 plus 4?<|assistant|>",
    "<|user|>Which is bigger, 9 or 12?<|assistant|>",
    "the quick brown fox",
    "<|user|>hello<|assistant|>",
    "says",
    "<|user|>What is 9 plus 12?<|assistant|>",
    "jumps over",
)
START_S = 60.0
"""Longest start of a process on a busy machine."""


@dataclass
class ServiceProcess:
    """One ``kleash serve`` process that can be killed and started again on its port."""

    name: str
    model: Path
    log: Path
    port: int
    process: subprocess.Popen[bytes] | WarmProcess | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        command = kleash_command(
            "serve",
            self.name,
            f"--model={self.model}",
            f"--server.port={self.port}",
            "--device=cpu",
            "--num_threads=1",
        )
        self.process = start_process(command, self.log)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()


def start_process(command: list[str], log: Path) -> subprocess.Popen[bytes] | WarmProcess:
    """Start a command with one compute thread, its output in ``log``."""
    if command[0] == sys.executable:
        return WarmProcess(command, log)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


@dataclass(frozen=True, eq=False)
class Cluster:
    """Folders, and the three services as processes of their own."""

    model: Path
    reward_model: Path
    prompts: Path
    processes: dict[str, ServiceProcess]

    def addresses(self) -> dict[str, Any]:
        addresses: dict[str, Any] = {
            name: process.address for name, process in self.processes.items()
        }
        return {**addresses, "policy": [addresses["policy"]]}

    def config(self, out: Path, **changes: Any) -> PPOConfig:
        """A run of five steps; ``changes`` are sections or keys."""
        keys: dict[str, Any] = {
            "out": out,
            "prompts": str(self.prompts),
            "model": self.model,
            "reward_model": self.reward_model,
            "total_steps": 5,
            "batch_size": 16,
            "max_prompt_tokens": 40,
            "sampling": {"max_new_tokens": 12, "stop_token_ids": list(range(5, 30))},
            "algorithm": {"epochs": 2, "minibatches": 2},
            "policy": {"learning_rate": 1e-3},
            "value": {"learning_rate": 1e-3},
            "kl": {"controller": "adaptive", "coefficient": 0.1, "target": 0.5},
            "services": {"group_size": 4, "wait_s": START_S, **self.addresses()},
            "checkpoint": {"every": 2, "keep": 2},
            "num_threads": 1,
        }
        for name, value in changes.items():
            keys[name] = {**keys.get(name, {}), **value} if isinstance(value, dict) else value
        return PPOConfig.model_validate(keys)

    @staticmethod
    def steps(out: Path) -> list[dict[str, Any]]:
        """The steps of metrics.jsonl that are complete lines."""
        path = out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [row for row in rows if "step_s" in row]

    @staticmethod
    def learned(out: Path) -> list[dict[str, Any]]:
        """The steps without what depends on the clock."""
        return [
            {name: value for name, value in row.items() if not name.endswith("_s")}
            for row in Cluster.steps(out)
        ]

    def trainer(self, config: PPOConfig, *flags: str) -> TrainerProcess:
        """Start ``kleash ppo`` with this configuration."""
        path = config.out.with_suffix(".json")
        path.write_text(config.model_dump_json())
        log = config.out.with_suffix(".log")
        return TrainerProcess(
            config.out, log, start_process(kleash_command("ppo", str(path), *flags), log)
        )


@dataclass(frozen=True, eq=False)
class TrainerProcess:
    """A ``kleash ppo`` process."""

    out: Path
    log: Path
    process: subprocess.Popen[bytes] | WarmProcess

    def wait_for_steps(self, count: int) -> None:
        """Until ``count`` steps are in metrics.jsonl."""
        self.wait_until(lambda: len(Cluster.steps(self.out)) >= count, f"{count} steps")

    def wait_until(self, is_done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 2 * START_S
        while not is_done():
            assert self.process.poll() is None, f"the trainer ended early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.log.read_text()}"
            time.sleep(0.01)

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if any, and wait; returns the exit status."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(timeout=2 * START_S)


@pytest.fixture(scope="session")
def cluster(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Three service processes that all end-to-end PPO tests share."""
    folder = tmp_path_factory.mktemp("cluster")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    models = {"policy": tiny_folder, "reward": tiny_reward_folder, "reference": tiny_folder}
    cluster = Cluster(
        model=tiny_folder,
        reward_model=tiny_reward_folder,
        prompts=prompts,
        processes={
            name: ServiceProcess(name, model, folder / f"{name}.log", free_port())
            for name, model in models.items()
        },
    )
    try:
        for process in cluster.processes.values():
            process.start()
        yield cluster
    finally:
        for process in cluster.processes.values():
            process.stop()
        for process in cluster.processes.values():
            if process.process is not None:
                process.process.wait(timeout=START_S)


@pytest.fixture(scope="session")
def remote(cluster: Cluster) -> Iterator[Services]:
    """Clients of the service processes."""
    with connect(cluster.config(Path("unused")).services) as services:
        yield services
