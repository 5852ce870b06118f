"""The process in which an operator's reward function runs. Imports the standard library alone.

python -P function_child.py SOCKET_FD PARENT_PID

Frames over the socket, both ways: eight bytes of length, then JSON. The first one asks for the
function; each of the others holds items, and its answer one result for each. Standard output and
error are the function's own and go to the service's log.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LENGTH = struct.Struct(">Q")
PARENT_CHECK_S = 1.0
MAX_MESSAGE_CHARS = 300
"""Of an error's text in a reply; the whole of it is in the log."""


class _CannotUse(Exception):  # noqa: N818
    """The function cannot be used; the message is a sentence."""


def main() -> None:
    """Serve until the socket is closed or the parent is gone."""
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(fd, False)  # a process that the function starts must not hold it open
    channel = socket.socket(fileno=fd)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        function, hello = _find(**json.loads(_read(channel)))
    except _CannotUse as error:
        _write(channel, {"error": str(error)})
        return
    _write(channel, hello)
    while frame := _read(channel):
        _write(channel, {"results": _results(function, json.loads(frame)["items"])})


def _find(target: str, path: Sequence[str]) -> tuple[Callable[..., Any], dict[str, str]]:
    module_name, _, name = target.partition(":")
    sys.path[:0] = path
    try:
        module = importlib.import_module(module_name)
        function: Any = module
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:
        traceback.print_exc()
        raise _CannotUse(f"{target} cannot be imported: {_describe(error)}") from None
    if not callable(function) or inspect.iscoroutinefunction(function):
        kind = "a coroutine function" if callable(function) else f"a {type(function).__name__}"
        raise _CannotUse(f"{target} is {kind}; it must be a function that returns a list.")
    _check_signature(target, function)
    if not (file := getattr(module, "__file__", None)):
        raise _CannotUse(f"{target} has no source file, which its revision is the digest of.")
    digest = hashlib.sha256(Path(file).read_bytes() + b"\0" + target.encode()).hexdigest()
    return function, {"sha256": digest, "file": file}


def _check_signature(target: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # written in C
        return
    try:
        signature.bind([])
    except TypeError:
        raise _CannotUse(
            f"{target}{signature} cannot be called with one list of items; it must take that alone."
        ) from None


def _results(function: Callable[..., Any], items: list[Any]) -> list[dict[str, Any]]:
    """One result per item. After an error each item is tried alone, so that it sinks no other."""
    try:
        returned = function(items)
        if isinstance(returned, str | dict) or len(returned) != len(items):
            raise TypeError(_wrong_return(returned, len(items)))
        return [_result(value) for value in returned]
    except Exception as error:
        traceback.print_exc()
        if len(items) == 1:
            return [{"error": _describe(error)}]
        return [_results(function, [item])[0] for item in items]


def _result(value: Any) -> dict[str, Any]:
    if isinstance(value, Exception):
        return {"error": _describe(value)}
    try:
        if isinstance(value, dict):
            return {"parts": {str(name): _number(part) for name, part in value.items()}}
        return {"score": _number(value)}
    except Exception as error:
        return {"error": _describe(error)}


def _number(value: Any) -> float:
    if not hasattr(type(value), "__float__") and not hasattr(type(value), "__index__"):
        raise TypeError(f"it returned {type(value).__name__} where a number is due")
    return float(value)


def _wrong_return(returned: Any, num_items: int) -> str:
    if isinstance(returned, str | dict):
        return f"it returned {type(returned).__name__} and not a list of {num_items}"
    return f"it returned {len(returned)} results for {num_items} items"


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    if len(text) > MAX_MESSAGE_CHARS:
        text = text[:MAX_MESSAGE_CHARS] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _read(channel: socket.socket) -> bytes:
    """The next frame; empty when the parent is gone."""
    head = _receive(channel, LENGTH.size)
    return _receive(channel, LENGTH.unpack(head)[0]) if head else b""


def _receive(channel: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = channel.recv(min(count - len(data), 1 << 20))
        if not part:
            return b""
        data += part
    return bytes(data)


def _write(channel: socket.socket, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    channel.sendall(LENGTH.pack(len(body)) + body)


def _end_with(parent: int) -> None:
    """End this process and those that it started when the service is gone."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
