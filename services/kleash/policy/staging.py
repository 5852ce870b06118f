"""A published version on its way in: where its chunks are collected, and which are there."""

from __future__ import annotations

import time
from bisect import bisect_left

import numpy as np
import xxhash

from kleash.rpc.errors import InvalidRequest, PreconditionFailed
from kleash.weights.v1 import weights_pb2

ALIGNMENT = 64
"""Tensors start on multiples of this in the staging buffer, so that it can be read as any type."""


class Staging:
    """A version on its way in."""

    def __init__(self, manifest: weights_pb2.Manifest, buffer: np.ndarray) -> None:
        self.manifest = manifest
        self.began = time.monotonic()
        self.num_bytes = 0
        self.is_applying = False
        self._buffer = buffer
        self._offsets = tensor_offsets(manifest)
        self._starts: list[list[int]] = [[] for _ in manifest.tensors]
        self._chunks: list[dict[int, tuple[int, int]]] = [{} for _ in manifest.tensors]

    def add(self, chunk: weights_pb2.Chunk) -> None:
        """Store a chunk, in any order. The same chunk again is ignored; an overlap is refused."""
        index, start, end = chunk.tensor_index, chunk.offset, chunk.offset + len(chunk.data)
        if index >= len(self.manifest.tensors):
            raise InvalidRequest(
                f"a chunk is of tensor {index} and the manifest has {len(self.manifest.tensors)}.",
                field="chunk.tensor_index",
            )
        entry = self.manifest.tensors[index]
        if not chunk.data or end > entry.encoded_bytes:
            raise InvalidRequest(
                f"a chunk of tensor '{entry.name}' covers bytes {start} to {end}; it needs at "
                f"least one, and the tensor has {entry.encoded_bytes}.",
                field="chunk.offset",
            )
        if xxhash.xxh3_64_intdigest(chunk.data) != chunk.xxh3_64:
            raise PreconditionFailed(
                f"bytes {start} to {end} of tensor '{entry.name}' do not have the checksum that "
                "came with them; publish again.",
                reason="DIGEST_MISMATCH",
                metadata={"layer": "chunk", "tensor": entry.name, "offset": str(start)},
            )
        starts, chunks = self._starts[index], self._chunks[index]
        if chunks.get(start) == (end, chunk.xxh3_64):
            return
        place = bisect_left(starts, start)
        overlaps_before = place > 0 and chunks[starts[place - 1]][0] > start
        overlaps_after = place < len(starts) and starts[place] < end
        if overlaps_before or overlaps_after:
            raise InvalidRequest(
                f"bytes {start} to {end} of tensor '{entry.name}' overlap bytes that were sent "
                "before; send every byte once.",
                field="chunk.offset",
            )
        starts.insert(place, start)
        chunks[start] = (end, chunk.xxh3_64)
        self.num_bytes += len(chunk.data)
        first = self._offsets[index]
        self._buffer[first + start : first + end] = np.frombuffer(chunk.data, np.uint8)

    def tensor_bytes(self, index: int) -> np.ndarray:
        """The staged bytes of a tensor."""
        first = self._offsets[index]
        return self._buffer[first : first + self.manifest.tensors[index].encoded_bytes]

    def missing(self) -> str:
        """A sentence about the first tensor that is not complete; empty when all are."""
        for entry, chunks in zip(self.manifest.tensors, self._chunks, strict=True):
            have = sum(end - start for start, (end, _) in chunks.items())
            if have != entry.encoded_bytes:
                return f"tensor '{entry.name}' has {have} of {entry.encoded_bytes} bytes"
        return ""


def tensor_offsets(manifest: weights_pb2.Manifest) -> list[int]:
    """Where each tensor starts in the staging buffer."""
    offsets, end = [], 0
    for entry in manifest.tensors:
        offsets.append(end)
        end += -(-entry.encoded_bytes // ALIGNMENT) * ALIGNMENT
    return offsets


def buffer_size(manifest: weights_pb2.Manifest) -> int:
    """Bytes of a staging buffer."""
    return tensor_offsets(manifest)[-1] + manifest.tensors[-1].encoded_bytes
