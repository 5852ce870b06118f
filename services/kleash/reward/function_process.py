"""The life of the process that runs a reward function: start, call within a time, end.

function_child.py is the other side. The process leads a group of its own, which is killed as a
whole. What it prints goes to the log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from kleash.reward import function_child
from kleash.reward.function_child import LENGTH

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""For the import of the function's module, which may load a model."""
LOOK_S = 0.5
"""A process that a function started may hold the socket open; this often its death is looked at."""
MAX_LINE_BYTES = 4096


class FunctionTimeout(Exception):  # noqa: N818
    """The time is over, and the process was killed."""


class FunctionEnded(Exception):  # noqa: N818
    """The process ended by itself; the message says how."""


class FunctionUnusable(Exception):  # noqa: N818
    """The function cannot be found or called; the message is a sentence."""


class FunctionProcess:
    """One process, started when it is needed, and anew after it was killed. Not thread-safe."""

    def __init__(self, target: str, path: Sequence[Path], *, name: str) -> None:
        """Args:
        target: "module:function".
        path: folders to find the module in, before others.
        name: of the model, for the log.
        """
        self._target = target
        self._path = [str(Path(each).resolve()) for each in path]
        self._name = name
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self.sha256 = ""
        """Of the module's file and the function's name, once started."""

    def start(self) -> None:
        """Start it unless it runs.

        Raises FunctionUnusable, also when the file has changed since the first start: an answer
        would carry the revision of what is gone.
        """
        if self._child is not None and self._child.poll() is None:
            return
        self.stop()  # what is left of one that ended between two calls
        self._spawn()
        try:
            hello = self._ask({"target": self._target, "path": self._path}, START_TIMEOUT_S)
        except FunctionTimeout:
            raise FunctionUnusable(
                f"{self._target} was not imported within {START_TIMEOUT_S:g} s."
            ) from None
        except FunctionEnded as error:
            raise FunctionUnusable(f"{self._target}: its process {error} at import.") from None
        if "error" in hello:
            self.stop()
            raise FunctionUnusable(hello["error"])
        if self.sha256 not in ("", hello["sha256"]):
            self.stop()
            raise FunctionUnusable(
                f"{hello['file']} has changed since this model was loaded; load it again."
            )
        self.sha256 = hello["sha256"]

    def call(self, items: list[dict[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
        """One result per item. Raises FunctionTimeout, FunctionEnded or FunctionUnusable."""
        self.start()
        return self._ask({"items": items}, timeout_s)["results"]

    def stop(self) -> None:
        """Kill the process and those that it started."""
        child, channel = self._child, self._channel
        self._child = self._channel = None
        if channel is not None:
            channel.close()
        if child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-u", function_child.__file__]
            self._child = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._channel = ours
        assert self._child.stdout is not None
        threading.Thread(
            target=_log_lines, args=(self._child.stdout, self._name), daemon=True
        ).start()

    def _ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        ends = time.monotonic() + timeout_s
        body = json.dumps(message).encode()
        try:
            self._send(LENGTH.pack(len(body)) + body, ends)
            (length,) = LENGTH.unpack(self._receive(LENGTH.size, ends))
            return json.loads(self._receive(length, ends))
        except (FunctionTimeout, FunctionEnded):
            self.stop()
            raise
        except ValueError:  # the function has written to a descriptor that it did not open
            self.stop()
            raise FunctionEnded("broke its connection") from None

    def _send(self, data: bytes, ends: float) -> None:
        assert self._channel is not None
        view = memoryview(data)
        while view:
            self._channel.settimeout(self._wait_s(ends))
            try:
                view = view[self._channel.send(view) :]
            except TimeoutError:
                if self._is_gone:
                    raise FunctionEnded(self._ending()) from None
            except OSError:
                raise FunctionEnded(self._ending()) from None

    def _receive(self, count: int, ends: float) -> bytes:
        assert self._channel is not None
        data = bytearray()
        while len(data) < count:
            self._channel.settimeout(self._wait_s(ends))
            try:
                part = self._channel.recv(min(count - len(data), 1 << 20))
            except TimeoutError:
                if self._is_gone:
                    raise FunctionEnded(self._ending()) from None
                continue
            except OSError:
                part = b""
            if not part:
                raise FunctionEnded(self._ending())
            data += part
        return bytes(data)

    @property
    def _is_gone(self) -> bool:
        return self._child is None or self._child.poll() is not None

    def _wait_s(self, ends: float) -> float:
        left_s = ends - time.monotonic()
        if left_s <= 0:
            raise FunctionTimeout
        return min(left_s, LOOK_S)

    def _ending(self) -> str:
        assert self._child is not None
        try:
            status = self._child.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"ended with exit status {status}"


def _log_lines(stream: IO[bytes], name: str) -> None:
    """Each line that the function prints, until nobody holds its output open."""
    with stream:
        while line := stream.readline(MAX_LINE_BYTES):
            logger.info("function of '%s': %s", name, line.decode(errors="replace").rstrip())
