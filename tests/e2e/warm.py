"""Processes that are forked from one that has imported everything, and not started from nothing.

Importing torch and transformers is most of what a small ``kleash serve`` or ``kleash ppo`` costs. A
forked process is one like any other: its own memory, threads, ports, signals and exit status. How
the commands start from nothing is tested by test_up.py, test_readme.py and test_demo.py.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOAD = [
    "kleash.policy.service",
    "kleash.reward.service",
    "kleash.reference.service",
    "kleash.ppo.run",
    "transformers.models.llama.modeling_llama",
    "tests.e2e.warm",
]


class WarmProcess:
    """What subprocess.Popen does of this, with a command whose first word is this Python."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        log.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        arguments = (list(command), log, {**os.environ, "OMP_NUM_THREADS": "1"})
        self._process: ForkServerProcess = context.Process(target=_become, args=arguments)
        self._process.start()
        self._command = command

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._command, timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    """Run ``python -m MODULE ARGUMENTS`` or ``python SCRIPT ARGUMENTS`` in this process."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    # The others are the test's: a fork in place of an exec keeps what was open, and its warnings.
    sys.warnoptions.clear()
    python, *words = command
    assert python == sys.executable
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
