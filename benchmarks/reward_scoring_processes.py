"""The processes of reward_scoring.py: two servers, and children that answer questions."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
START_S = 120
FRAMEWORK = HERE.parent / "build" / "bench"
"""Where FastAPI and uvicorn lie: make build/bench/.installed."""


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Process:
    """A child that is ended with the block."""

    def __init__(self, *command: str, pipes: bool = False, **environment: str) -> None:
        pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=pipe,
            stdout=pipe,
            stderr=None if pipes else subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        self.process.terminate()
        self.process.wait()

    def check(self) -> None:
        """Raise SystemExit when the process has ended."""
        if self.process.poll() is not None:
            raise SystemExit(f"{self.process.args} ended with status {self.process.returncode}")


class Asked(Process):
    """A child that answers one JSON object a line with another."""

    def __init__(self, script: str, *arguments: str) -> None:
        super().__init__(str(HERE / script), *arguments, pipes=True)

    def ask(self, **job: Any) -> dict[str, Any]:
        """Its answer to one question."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended instead of answering {job}")
        return json.loads(line)


class Ours(Process):
    """``kleash serve reward``."""

    def __init__(self, model: Path, threads: int, *flags: str) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        super().__init__(
            "-m",
            "kleash.cli",
            "serve",
            "reward",
            f"--model={model}",
            f"--num_threads={threads}",
            f"--server.port={port}",
            "--server.metrics_port=0",
            *flags,
        )

    def wait(self) -> Self:
        """Until it serves."""
        from kleash.client.reward import RewardClient

        with RewardClient(self.address, timeout_s=START_S) as client:
            end = time.monotonic() + START_S
            while True:
                self.check()
                try:
                    client.get_model()
                except Exception:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.2)
                else:
                    return self


class Serial(Process):
    """The server that scores one request at a time."""

    def __init__(self, model: Path, threads: int) -> None:
        if not FRAMEWORK.is_dir():
            raise SystemExit(f"{FRAMEWORK} is missing; run make bench-framework")
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        script = HERE / "reward_scoring_serial.py"
        super().__init__(
            str(script), str(model), str(port), str(threads), PYTHONPATH=str(FRAMEWORK)
        )

    def wait(self) -> Self:
        """Until it serves."""
        end = time.monotonic() + START_S
        while True:
            self.check()
            connection = http.client.HTTPConnection(self.address, timeout=START_S)
            try:
                connection.request("GET", "/")
                connection.getresponse()
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
            else:
                return self
            finally:
                connection.close()
