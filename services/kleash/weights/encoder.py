"""Encoding a version: each tensor's new bits against the shadow's, into a manifest and an object.

The shadow holds the bits of the last committed version. It changes only when the next one is
committed. A trainer that is sharded gives each rank's flat range of every tensor, encodes them side
by side, and ``merge`` puts the manifests together: no rank ever holds a whole model.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kleash.weights.codec import Codec, apply_encoded, encode
from kleash.weights.digest import MASK, combine_digests, digest_bytes, tensor_sum
from kleash.weights.manifest import (
    Schema,
    describe_part,
    manifest_hash,
    places,
    result_digest,
    schema_digest,
)
from kleash.weights.v1 import weights_pb2

PART_WORDS = 1 << 24
"""Elements of a part: 32 MiB of bf16 are encoded at a time."""


@dataclass(frozen=True, eq=False)
class Shard:
    """A flat range of one tensor: all of it, or what one rank of a sharded trainer holds."""

    words: np.ndarray
    """Its bits, flat unsigned."""
    first: int = 0
    """Flat index of the first element in the whole tensor."""


Words = Callable[[str], Shard]
"""The new bits of a tensor, asked for one tensor at a time so that no cast copies the model."""


@dataclass(eq=False)
class Shadow:
    """The bits of the last committed version, or of one rank's share of it."""

    schema: Schema
    shards: dict[str, Shard]
    sums: dict[str, int]
    """Digest sum of every shard."""

    @staticmethod
    def of(schema: Schema, words: Words) -> Shadow:
        """A copy of the weights as they are now."""
        shards, sums = {}, {}
        for name in schema:
            shard = words(name)
            shards[name] = Shard(shard.words.copy(), shard.first)
            sums[name] = tensor_sum(shards[name].words, shard.first)
        return Shadow(schema, shards, sums)

    @property
    def num_bytes(self) -> int:
        """Memory of the bits."""
        return sum(shard.words.nbytes for shard in self.shards.values())

    @property
    def digest(self) -> str:
        """Model digest; of a shadow that holds whole tensors."""
        return digest_of(self.schema, self.sums)

    def advance(
        self, manifest: weights_pb2.Manifest, data: np.ndarray, sums: Mapping[str, int]
    ) -> None:
        """Become the version of ``manifest``, whose object is ``data``, with these sums."""
        view = data.data
        for entry, part, offset in places(manifest):
            shard = self.shards[entry.name]
            start = part.first_element - shard.first
            if not 0 <= start < len(shard.words):
                continue  # another rank's
            words = shard.words[start : start + part.num_elements]
            encoded = view[offset : offset + part.encoded_bytes]
            apply_encoded(words, Codec(part.codec), encoded)
        self.sums = dict(sums)


@dataclass(eq=False)
class EncodedShards:
    """One rank's parts of a version, and the sums of its shards afterwards."""

    parts: dict[str, list[weights_pb2.Part]] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)
    path: Path = Path()
    """The parts' bytes, in the order of the names and then of the parts."""


def encode_shards(
    schema: Schema, shadow: Shadow | None, words: Words, folder: Path
) -> EncodedShards:
    """Encode every shard against ``shadow``, or whole when there is none, into a file."""
    made = EncodedShards()
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".encode-")
    made.path = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for tensor in schema:
                old = shadow.shards[tensor].words if shadow else None
                total = shadow.sums[tensor] if shadow else 0
                parts, total = _encode_tensor(words(tensor), old, total, file)
                made.parts[tensor], made.sums[tensor] = parts, total
    except BaseException:
        made.path.unlink(missing_ok=True)
        raise
    return made


def _encode_tensor(
    shard: Shard, old: np.ndarray | None, total: int, file: BinaryIO
) -> tuple[list[weights_pb2.Part], int]:
    parts = []
    for start in range(0, len(shard.words), PART_WORDS):
        new = shard.words[start : start + PART_WORDS]
        before = None if old is None else old[start : start + PART_WORDS]
        first = shard.first + start
        made = encode(before, new, first)
        if made is None:
            continue
        total = (total + made.sum_change) & MASK
        file.write(made.data)
        parts.append(describe_part(made, first, len(new)))
    return parts, total


def merge(
    schema: Schema,
    ranks: Sequence[EncodedShards],
    folder: Path,
    *,
    run_id: str,
    fence: int,
    version: int,
    base: tuple[int, str],
) -> tuple[weights_pb2.Manifest, Path]:
    """The manifest of all ranks' parts, and one file with its object; the ranks' files are removed.

    ``base`` is the version and the digest that the parts were encoded against; (0, "") for none.
    """
    manifest = weights_pb2.Manifest(
        run_id=run_id,
        fence=fence,
        version=version,
        base_version=base[0],
        base_digest=base[1],
        schema_digest=schema_digest(schema),
    )
    pieces: list[tuple[int, int, int]] = []
    read = [0] * len(ranks)
    for name, shape in schema.items():
        entry = manifest.tensors.add(name=name, shape=shape.shape, dtype=shape.dtype)
        entry.digest = digest_bytes(sum(rank.sums[name] for rank in ranks) & MASK)
        of_tensor = []
        for index, rank in enumerate(ranks):
            for part in rank.parts[name]:
                of_tensor.append((part.first_element, part, index, read[index]))
                read[index] += part.encoded_bytes
        for _, part, index, offset in sorted(of_tensor, key=lambda it: it[0]):
            entry.parts.append(part)
            pieces.append((index, offset, part.encoded_bytes))
    manifest.result_digest = result_digest(manifest)
    manifest.manifest_hash = manifest_hash(manifest)
    if len(ranks) == 1:
        return manifest, ranks[0].path
    return manifest, _interleave([rank.path for rank in ranks], pieces, folder)


def _interleave(
    paths: Sequence[Path], pieces: Iterable[tuple[int, int, int]], folder: Path
) -> Path:
    """Copy (file, offset, size) pieces one after another into a new file."""
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".merge-")
    sources = [path.open("rb") for path in paths]
    try:
        with os.fdopen(descriptor, "wb") as target:
            for index, offset, size in pieces:
                sources[index].seek(offset)
                target.write(sources[index].read(size))
    finally:
        for source in sources:
            source.close()
    for path in paths:
        path.unlink()
    return Path(name)


def digest_of(schema: Schema, sums: Mapping[str, int]) -> str:
    """Model digest from the sums of whole tensors."""
    return combine_digests(
        (name, it.dtype, it.shape, digest_bytes(sums[name])) for name, it in schema.items()
    )
