"""What a target of ``kleash weights`` is, and the versions in a folder or of a publisher."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kleash.base.errors import ConfigError, DataError
from kleash.client.weights import WeightsStoreClient
from kleash.rpc.errors import PreconditionFailed
from kleash.weights.store import describe, read_folder, read_log
from kleash.weights.v1 import weights_pb2

ANSWER_S = 30.0
"""Longest wait for an answer that needs no computation."""

TARGET = "an address host:port, a run's folder or its weights/ folder, or a HASH.manifest file"


class Row(NamedTuple):
    """A version of a store."""

    info: weights_pb2.VersionInfo
    kind: str
    """anchor, delta or squash; "-" for a pruned version whose log does not tell."""
    state: str
    """stored, deciding, committed, or given up with the phase."""
    is_kept: bool
    """Whether its files are there; without them only the key, the base and the time are known."""


class Versions(NamedTuple):
    """A store, as its folder or its publisher describes it."""

    head: weights_pb2.VersionKey | None
    rows: list[Row]


def locate(target: str) -> Path | str:
    """The manifest file or store folder that ``target`` names, or the address that it is.

    Raises ConfigError.
    """
    path = Path(target)
    if path.is_file() and path.suffix == ".manifest":
        return path
    for folder in (path / "weights", path):
        if (folder / "log.jsonl").is_file() or any(folder.glob("[!.]*.manifest")):
            return folder
    if not path.exists() and re.fullmatch(r"[^\s/]+:\d+|unix:\S+|[a-z]+://\S+", target):
        return target
    seen = "holds no published weights" if path.exists() else "does not exist and is no address"
    raise ConfigError(f"'{target}' {seen}; name {TARGET}.")


def publisher_versions(address: str) -> Versions | None:
    """None when a replica answers: it hosts the store's service too, and refuses to plan."""
    try:
        with WeightsStoreClient(address, timeout_s=ANSWER_S) as store:
            rows = [
                Row(info, _kind(info), "committed" if info.is_committed else "stored", True)
                for info in store.list_versions()
            ]
            return Versions(store.get_head(), rows)
    except PreconditionFailed as error:
        if error.reason != "NOT_A_PUBLISHER":
            raise
        return None


def folder_versions(folder: Path) -> Versions:
    """Every version that the folder's log or files know. Raises DataError."""
    log = store_log(folder)
    stored = {it.object_id.hex(): it for it in read_folder(folder)}
    events: dict[str, list[Mapping[str, Any]]] = {}
    for event in log:
        events.setdefault(event["manifest_hash"], []).append(event)
    rows = []
    for name in dict.fromkeys((*events, *stored)):
        of_version = events.get(name, [])
        state = _state(of_version)
        if name in stored:
            info = describe(stored[name], state == "committed")
            rows.append(Row(info, _kind(info), state, True))
        else:
            info = weights_pb2.VersionInfo(
                key=_key(of_version[0]),
                base_version=of_version[0].get("base_version", 0),
                is_committed=state == "committed",
                stored_at_s=of_version[0]["time_s"],
            )
            rows.append(Row(info, _pruned_kind(info, state), state, False))
    committed = [event for event in log if event["event"] == "committed"]
    return Versions(_key(committed[-1]) if committed else None, rows)


def store_log(folder: Path) -> list[dict[str, Any]]:
    """The log's events. Raises DataError."""
    try:
        return read_log(folder)
    except ValueError as error:
        raise DataError(f"{folder / 'log.jsonl'} has a line that is not JSON: {error}") from None


def _key(event: Mapping[str, Any]) -> weights_pb2.VersionKey:
    return weights_pb2.VersionKey(
        run_id=event["run_id"],
        fence=event["fence"],
        version=event["version"],
        manifest_hash=bytes.fromhex(event["manifest_hash"]),
        digest=event["digest"],
    )


def _state(events: Sequence[Mapping[str, Any]]) -> str:
    decided = [event for event in events if event["event"] != "stored"]
    if not decided:
        return "stored"
    if decided[-1]["event"] == "given_up":
        return f"given up ({decided[-1]['phase']})"
    return decided[-1]["event"]


def _kind(info: weights_pb2.VersionInfo) -> str:
    if not info.base_digest:
        return "anchor"
    return "squash" if info.key.version > info.base_version + 1 else "delta"


def _pruned_kind(info: weights_pb2.VersionInfo, state: str) -> str:
    """As far as the log tells: replicas are asked to take deltas, the rest is made for plans."""
    if state != "stored":
        return "delta"
    return "squash" if 0 < info.base_version < info.key.version - 1 else "-"
