"""Rows of a W&B run file, as ``wandb sync`` would send them.

The file is a log in LevelDB's format: blocks of 32 KiB, records that may span blocks, each a
protobuf message of W&B's.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = 7
BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def history(path: Path) -> list[dict[str, Any]]:
    """Rows that were logged, with W&B's own ``_step``."""
    rows = []
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {it.key or "/".join(it.nested_key): json.loads(it.value_json) for it in items}
            rows.append({"_step": record.history.step.num, **row})
    return rows


def run_of(path: Path) -> Any:
    """The record that describes the run."""
    return next(it.run for it in _records(path) if it.WhichOneof("record_type") == "run")


def config_of(path: Path) -> dict[str, Any]:
    """Its configuration."""
    return {it.key: json.loads(it.value_json) for it in run_of(path).config.update}


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    for message in _messages(path.read_bytes()):
        record = Record()
        record.ParseFromString(message)
        yield record


def _messages(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B", "the format of W&B's file has changed"
    place, message = HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _crc, length, kind = struct.unpack_from("<IHB", content, place)
        place += HEADER
        message += content[place : place + length]
        place += length
        if kind in (FULL, LAST):
            yield message
            message = b""
