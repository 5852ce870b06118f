"""The publisher's versions on disk, and the cheapest way from one to another.

WEIGHTS/
  log.jsonl        what happened to which version: stored, deciding, committed, given_up
  HASH.manifest    a version, an anchor or a squashed delta; immutable
  HASH.object      its encoded bytes

chain   d(v+1) d(v+2) ... d(head)     as they were published
squash  one delta with the same effect, made when it is first asked for
anchor  all weights at one version, made from the trainer's shadow when nothing shorter helps
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from kleash.rpc.errors import NotFound, PreconditionFailed, Unavailable
from kleash.weights.fetch import CHUNK_BYTES, chunk
from kleash.weights.manifest import (
    dense_bytes,
    encoded_bytes,
    key_of,
    manifest_hash,
    num_changed,
    schema_of,
)
from kleash.weights.squash import squash_versions
from kleash.weights.stored import Stored, is_sound, shortest_path
from kleash.weights.v1 import weights_pb2

logger = logging.getLogger(__name__)

KEEP_RATIO = 2
"""Deltas that are kept take at most so many times the bytes of the weights: beyond that an anchor
is the shorter way in any case."""

ANCHOR_RATIO = 0.5
"""A new anchor is made once what follows the last one is longer than this share of it."""

TORN_PREFIXES = (".encode-", ".merge-", ".squash-")
"""Names of files that are being written and become objects when they are whole."""


class Store:
    """Safe to use from several threads. ``listeners`` are called when the head changes."""

    def __init__(
        self,
        folder: Path,
        *,
        keep_versions: int = 64,
        make_anchor: Callable[[str], Stored | None] = lambda _: None,
        address: str = "the publisher",
    ) -> None:
        """Args:
        keep_versions: deltas that are kept for replicas that fall behind.
        make_anchor: stores all weights of a digest, when they are at hand.
        """
        self.folder = folder
        self.address = address
        self.make_anchor = make_anchor
        self._keep_versions = keep_versions
        self.listeners: set[Callable[[], None]] = set()
        self._lock = threading.Lock()
        self._planning = threading.Lock()
        self._head: weights_pb2.VersionKey | None = None
        folder.mkdir(parents=True, exist_ok=True)
        _remove_torn(folder)
        self._stored = {it.object_id: it for it in read_folder(folder)}
        self._committed = [
            bytes.fromhex(event["manifest_hash"])
            for event in read_log(folder)
            if event["event"] == "committed"
        ]
        self._log_file = (folder / "log.jsonl").open("a", encoding="utf-8")

    # ------------------------------------------------------------------------------ the publisher

    def put(self, manifest: weights_pb2.Manifest, object_file: Path) -> Stored:
        """Take in a version whose object is in ``object_file``, which is moved."""
        name = manifest.manifest_hash.hex()
        with object_file.open("rb") as file:
            os.fsync(file.fileno())  # a crash of the machine must not leave a name without bytes
        os.replace(object_file, self.folder / f"{name}.object")
        partial = self.folder / f".{name}.manifest"
        partial.write_bytes(manifest.SerializeToString())
        os.replace(partial, self.folder / f"{name}.manifest")
        stored = Stored(manifest, self.folder / f"{name}.object", time.time())
        with self._lock:
            self._stored[stored.object_id] = stored
        self.record("stored", key_of(manifest), base_version=manifest.base_version)
        return stored

    def record(self, event: str, key: weights_pb2.VersionKey, **facts: Any) -> None:
        """Write what happens, or is about to happen, to a version: on disk when this returns."""
        row = {
            "time_s": round(time.time(), 3),
            "event": event,
            "run_id": key.run_id,
            "fence": key.fence,
            "version": key.version,
            "manifest_hash": key.manifest_hash.hex(),
            "digest": key.digest,
            **facts,
        }
        with self._lock:
            self._log_file.write(json.dumps(row) + "\n")
            self._log_file.flush()
            os.fsync(self._log_file.fileno())

    def commit(self, key: weights_pb2.VersionKey) -> None:
        """The version is the head from now on."""
        self.record("committed", key)
        with self._lock:
            if key.manifest_hash not in self._committed:
                self._committed.append(key.manifest_hash)
            self._head = key
        for listener in list(self.listeners):
            listener()
        # A plan that is being made reads what pruning would remove; there is a next commit.
        if self._planning.acquire(blocking=False):
            try:
                self._prune()
            finally:
                self._planning.release()

    def discard(self, object_id: bytes) -> None:
        """Forget a version that was not committed."""
        with self._lock:
            stored = self._stored.pop(object_id, None)
        if stored is not None:
            stored.path.unlink(missing_ok=True)
            stored.path.with_suffix(".manifest").unlink(missing_ok=True)

    def close(self) -> None:
        """Close the log."""
        self._log_file.close()

    # ------------------------------------------------------------------------------- the replicas

    @property
    def head(self) -> weights_pb2.VersionKey | None:
        """The newest version that this publisher committed."""
        return self._head

    def fetch(self, object_id: bytes, offset: int) -> Iterator[weights_pb2.FetchResponse]:
        """Chunks from ``offset`` on. Raises NotFound."""
        stored = self._stored.get(object_id)
        if stored is None:
            raise NotFound(
                f"object {object_id.hex()[:12]} is not in the store any more; ask for a new plan.",
                reason="UNKNOWN_OBJECT",
            )
        with stored.path.open("rb") as file:
            file.seek(offset)
            while data := file.read(CHUNK_BYTES):
                yield chunk(offset, data)
                offset += len(data)

    def plan_update(
        self, have_digest: str, schema_digest: str, want_digest: str = ""
    ) -> weights_pb2.PlanUpdateResponse:
        """The manifests with the fewest bytes from one digest to another, default the head's.

        Raises Unavailable before the first commit, PreconditionFailed for another schema or a
        version that this store cannot reach.
        """
        with self._planning:
            head = self._head
            want = want_digest or (head.digest if head else "")
            if not want:
                raise Unavailable(
                    "no version is committed yet; ask again.", reason="NO_VERSION", retry_after_s=1
                )
            plan = [] if want == have_digest else self._shortest(have_digest, want)
            for stored in plan[:1]:
                if stored.manifest.schema_digest != schema_digest:
                    raise PreconditionFailed(
                        "the published weights are of another model; serve the checkpoint that "
                        "the trainer starts from.",
                        reason="SCHEMA_MISMATCH",
                        metadata={
                            "published": stored.manifest.schema_digest,
                            "served": schema_digest,
                        },
                    )
        return weights_pb2.PlanUpdateResponse(head=head, manifests=[it.manifest for it in plan])

    def versions(self) -> list[weights_pb2.VersionInfo]:
        """What is stored, oldest first."""
        return [describe(it, it.object_id in self._committed) for it in self._ordered()]

    # ---------------------------------------------------------------------------------- planning

    def _shortest(self, have: str, want: str) -> list[Stored]:
        stored = self._ordered()
        deltas = [it for it in stored if it.manifest.base_digest]
        anchors = [it for it in stored if not it.manifest.base_digest]
        paths = [shortest_path(deltas, have, want), shortest_path(stored, have, want)]
        used = {it.object_id: it for path in paths for it in path or []}
        if damaged := [object_id for object_id, it in used.items() if not is_sound(it)]:
            for object_id in damaged:
                logger.warning("object %s is damaged and left out", object_id.hex()[:12])
                self.discard(object_id)
            return self._shortest(have, want)
        ways = [self._squashed(path) for path in paths if path is not None]
        best = min(ways, key=_size, default=None)
        whole = (
            anchors[-1].size
            if anchors
            else dense_bytes(schema_of(stored[-1].manifest))
            if stored
            else 0
        )
        limit = whole * (1 + ANCHOR_RATIO) if best and not best[0].manifest.base_digest else whole
        if best is None or _size(best) > limit:
            anchor = self.make_anchor(want)
            if anchor is not None:
                best = [anchor] if best is None else min(best, [anchor], key=_size)
        if best is None:
            raise PreconditionFailed(
                f"the store has no way from {have} to {want}; publish a version, which makes one.",
                reason="NO_PLAN",
                metadata={"have": have, "want": want},
            )
        return best

    def _squashed(self, path: list[Stored]) -> list[Stored]:
        """The path with its deltas as one, where that is shorter."""
        deltas = [it for it in path if it.manifest.base_digest]
        anchors = path[: len(path) - len(deltas)]
        if len(deltas) < 2:
            return path
        made = squash_versions([(it.manifest, it.path) for it in deltas], self.folder)
        if made is None:
            return path
        manifest, file = made
        if manifest.manifest_hash in self._stored or encoded_bytes(manifest) >= _size(deltas):
            file.unlink()
            known = self._stored.get(manifest.manifest_hash)
            return path if known is None else [*anchors, known]
        return [*anchors, self.put(manifest, file)]

    def _ordered(self) -> list[Stored]:
        with self._lock:
            return sorted(self._stored.values(), key=lambda it: it.stored_at_s)

    # ----------------------------------------------------------------------------------- keeping

    def _prune(self) -> None:
        """Keep the newest deltas, the newest anchor, and squashed deltas that end at the head."""
        head = self._head
        assert head is not None
        ordered = self._ordered()
        deltas = [it for it in ordered if it.manifest.base_digest and not _is_squash(it)]
        keep = set()
        left = KEEP_RATIO * dense_bytes(schema_of(deltas[-1].manifest)) if deltas else 0
        for delta in deltas[: -self._keep_versions - 1 : -1]:
            left -= delta.size
            if left < 0:
                break
            keep.add(delta.object_id)
        anchors = [it for it in ordered if not it.manifest.base_digest]
        keep |= {it.object_id for it in anchors[-1:]}
        keep |= {
            it.object_id
            for it in ordered
            if _is_squash(it) and it.manifest.result_digest == head.digest
        }
        for stored in ordered:
            if stored.object_id not in keep and stored.object_id != head.manifest_hash:
                self.discard(stored.object_id)


def _remove_torn(folder: Path) -> None:
    """Remove what a process that was killed had half written: files, and the log's last line."""
    for path in list(folder.iterdir()):
        is_torn = path.name.startswith(TORN_PREFIXES) or path.match(".*.manifest")
        # An object comes before its manifest: without one nobody will ask for it.
        if is_torn or (path.suffix == ".object" and not path.with_suffix(".manifest").exists()):
            path.unlink()
    log = folder / "log.jsonl"
    if log.is_file():
        with log.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Every complete line of a store's log."""
    path = folder / "log.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_folder(folder: Path) -> list[Stored]:
    """What a store's folder holds; a manifest that cannot be read is named in the log and left."""
    found = []
    for path in folder.glob("[!.]*.manifest"):
        manifest = _read_manifest(path)
        if manifest is None:
            logger.warning("%s is not a manifest; it is left out", path)
            continue
        file = path.with_suffix(".object")
        if file.is_file() and file.stat().st_size == encoded_bytes(manifest):
            found.append(Stored(manifest, file, path.stat().st_mtime))
    # The clock of a file system is coarse: versions of one moment are in their own order.
    return sorted(found, key=lambda it: (it.stored_at_s, it.manifest.fence, it.manifest.version))


def _read_manifest(path: Path) -> weights_pb2.Manifest | None:
    """None when the file is damaged: replicas would refuse it."""
    try:
        manifest = weights_pb2.Manifest.FromString(path.read_bytes())
    except DecodeError:
        return None
    return manifest if manifest_hash(manifest) == manifest.manifest_hash else None


def describe(stored: Stored, is_committed: bool) -> weights_pb2.VersionInfo:
    """What ListVersions tells of a version."""
    manifest = stored.manifest
    schema = schema_of(manifest)
    return weights_pb2.VersionInfo(
        key=key_of(manifest),
        base_version=manifest.base_version,
        base_digest=manifest.base_digest,
        encoded_bytes=stored.size,
        dense_bytes=dense_bytes(schema),
        num_changed=num_changed(manifest),
        num_elements=sum(it.num_words for it in schema.values()),
        is_committed=is_committed,
        stored_at_s=stored.stored_at_s,
    )


def _size(path: Sequence[Stored]) -> int:
    return sum(stored.size for stored in path)


def _is_squash(stored: Stored) -> bool:
    manifest = stored.manifest
    return bool(manifest.base_digest) and manifest.version > manifest.base_version + 1
