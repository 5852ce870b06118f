"""A manifest with its object on disk, and the way with the fewest bytes through many of them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from kleash.weights.manifest import encoded_bytes, places
from kleash.weights.v1 import weights_pb2


@dataclass(frozen=True, eq=False)
class Stored:
    """A manifest and the file of its object."""

    manifest: weights_pb2.Manifest
    path: Path
    stored_at_s: float

    @property
    def size(self) -> int:
        return encoded_bytes(self.manifest)

    @property
    def object_id(self) -> bytes:
        return self.manifest.manifest_hash


def shortest_path(stored: Sequence[Stored], have: str, want: str) -> list[Stored] | None:
    """The way with the fewest bytes (Dijkstra): deltas lead from their base, anchors from any."""
    distance: dict[str, int] = {have: 0}
    came_by: dict[str, Stored] = {}
    queue = [(0, have)]
    done: set[str] = set()
    while queue:
        size, digest = heapq.heappop(queue)
        if digest in done:
            continue
        done.add(digest)
        if digest == want:
            break
        for it in stored:
            manifest = it.manifest
            leads_on = manifest.base_digest in ("", digest)
            total = size + it.size + 1  # one more for each step: a shorter chain among equals
            if leads_on and total < distance.get(manifest.result_digest, total + 1):
                distance[manifest.result_digest] = total
                came_by[manifest.result_digest] = it
                heapq.heappush(queue, (total, manifest.result_digest))
    if want not in done:
        return None
    path: list[Stored] = []
    at = want
    while at != have:
        path.append(came_by[at])
        if not came_by[at].manifest.base_digest:
            break
        at = came_by[at].manifest.base_digest
    return path[::-1]


def is_sound(stored: Stored) -> bool:
    """Whether every part of the object has its hash."""
    try:
        data = np.memmap(stored.path, np.uint8, "r") if stored.size else np.empty(0, np.uint8)
    except (OSError, ValueError):
        return False
    return len(data) == stored.size and all(
        xxhash.xxh3_128_digest(data[offset : offset + part.encoded_bytes].data) == part.xxh3_128
        for _, part, offset in places(stored.manifest)
    )
