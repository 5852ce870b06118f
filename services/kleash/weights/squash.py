"""Several consecutive deltas as one: for replicas that fell behind by more than a version."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kleash.weights.codec import Codec, squash
from kleash.weights.manifest import describe_part, manifest_hash, places, schema_of
from kleash.weights.v1 import weights_pb2

_Range = tuple[str, int, int]
"""Tensor, first element, number of elements."""


def squash_versions(
    chain: Sequence[tuple[weights_pb2.Manifest, Path]], folder: Path
) -> tuple[weights_pb2.Manifest, Path] | None:
    """One manifest, and a file in ``folder`` with its object, for a chain of deltas, oldest first.

    None when the versions were cut into parts at different places, so that there is nothing to add.
    Elements that are back at their old value in the end are left out.
    """
    first, last = chain[0][0], chain[-1][0]
    schema = schema_of(last)
    found: dict[_Range, list[tuple[Codec, bytes]]] = {}
    for manifest, path in chain:
        data = path.read_bytes()
        for entry, part, offset in places(manifest):
            key = (entry.name, part.first_element, part.num_elements)
            encoded = data[offset : offset + part.encoded_bytes]
            found.setdefault(key, []).append((Codec(part.codec), encoded))
    ranges = sorted(found)
    for one, other in itertools.pairwise(ranges):
        if one[0] == other[0] and other[1] < one[1] + one[2]:
            return None
    squashed = weights_pb2.Manifest()
    squashed.CopyFrom(last)
    squashed.base_version, squashed.base_digest = first.base_version, first.base_digest
    entries = {entry.name: entry for entry in squashed.tensors}
    for entry in squashed.tensors:
        del entry.parts[:]
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".squash-")
    with os.fdopen(descriptor, "wb") as file:
        for key in ranges:
            name_of_tensor, first_element, num_elements = key
            dtype = np.dtype(schema[name_of_tensor].word_type)
            made = squash(found[key], num_elements, dtype)
            if made is None:
                continue
            file.write(made.data)
            entries[name_of_tensor].parts.append(describe_part(made, first_element, num_elements))
    squashed.manifest_hash = manifest_hash(squashed)
    return squashed, Path(name)
