"""Child processes of ``kleash up``: own log files, watched, restarted, ended in order.

Services are restarted when they die (the trainer publishes the weights again to a policy that lost
them); the trainer's end is the end of the run. A child never outlives its parent: the kernel sends
it SIGTERM when the parent dies, even by SIGKILL.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from kleash.base.errors import KleashError

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1

STOP_S = 40.0
"""A service's drain_grace_s, 30 s unless its section says more, and what it needs to end itself."""


class ServiceDiedError(KleashError):
    """A supervised service ended and was not restarted any more."""


@dataclass
class Child:
    """One supervised process."""

    name: str
    command: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0

    def start(self) -> None:
        """Start it; standard output and error go to the log file."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = _spawn(self.command, log)
        logger.info("%s started, pid %d, log %s", self.name, self.process.pid, self.log)

    def tail(self, lines: int = 8) -> str:
        """The last lines of its log."""
        return "\n".join(
            self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        )


@dataclass
class Supervisor:
    """Starts services, watches them in a thread, and stops them."""

    max_restarts: int = 3
    children: list[Child] = field(default_factory=list)
    failure: str = ""

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        """Start every child and the watcher."""
        for child in self.children:
            child.start()
        self._watcher.start()

    def run_to_end(self, command: Sequence[str], *, grace_s: float = 120.0) -> int:
        """Run ``command`` on this terminal; SIGINT and SIGTERM go on to it as SIGTERM.

        Returns its exit status. Raises ServiceDiedError when a service could not be kept alive.
        """
        process = _spawn(command)
        received: list[int] = []

        def forward(number: int, _frame: object) -> None:
            received.append(number)
            (process.kill if len(received) > 1 else process.terminate)()

        previous = {
            number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)
        }
        ended_for_failure: float | None = None
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if self.failure and ended_for_failure is None:
                    ended_for_failure = time.monotonic()
                    process.terminate()
                elif (
                    ended_for_failure is not None and time.monotonic() - ended_for_failure > grace_s
                ):
                    process.kill()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.failure:
            raise ServiceDiedError(self.failure)
        return 128 + received[0] if received and process.returncode else process.returncode

    def stop(self, grace_s: float = STOP_S) -> None:
        """SIGTERM to every child, SIGKILL to those that are not gone after ``grace_s``."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        running = [
            child.process
            for child in self.children
            if child.process and child.process.poll() is None
        ]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + grace_s
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self) -> None:
        while not self._stopping.wait(0.2):
            for child in self.children:
                if self.failure or child.process is None or child.process.poll() is None:
                    continue
                status = child.process.returncode
                # Status 2 is the user's input (a model folder, a port): again would fail again.
                if status == 2 or child.restarts >= self.max_restarts:
                    self.failure = (
                        f"the {child.name} service ended with status {status} "
                        f"after {child.restarts} restarts; the end of {child.log}:\n{child.tail()}"
                    )
                    return
                child.restarts += 1
                logger.warning(
                    "%s ended with status %s; restart %d of %d",
                    child.name,
                    status,
                    child.restarts,
                    self.max_restarts,
                )
                child.start()


def kleash_command(*arguments: str) -> list[str]:
    """A command line that runs this installation's ``kleash``."""
    return [sys.executable, "-m", "kleash.cli", *arguments]


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _spawn(command: Sequence[str], log: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """A child in a session of its own, so that Ctrl-C reaches it through us; output to ``log``."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT if log else None,
        start_new_session=True,
        preexec_fn=_end_with_parent,  # noqa: PLW1509 (one system call, no locks)
    )


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
