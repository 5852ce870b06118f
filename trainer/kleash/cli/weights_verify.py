"""Checks of ``kleash weights verify``: a store's files, a replica's memory, a model's folder.

What is damaged comes as a sentence; kleash.cli.weights prints. torch is imported for a model alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from google.protobuf.message import DecodeError

from kleash.base.errors import DataError, KleashError
from kleash.client.weights import WeightsClient
from kleash.rpc.errors import PreconditionFailed, ServiceError
from kleash.weights.codec import Codec, decode_delta, decode_full
from kleash.weights.digest import MASK, digest_bytes, tensor_sum
from kleash.weights.encoder import digest_of
from kleash.weights.frames import CodecError
from kleash.weights.manifest import (
    FULL_CODECS,
    Place,
    TensorShape,
    check_manifest,
    encoded_bytes,
    manifest_hash,
    places,
    schema_digest,
    schema_of,
)
from kleash.weights.v1 import weights_pb2


@dataclass(frozen=True, eq=False)
class Checked:
    """A version's files, looked at."""

    path: Path
    manifest: weights_pb2.Manifest | None
    """None when it cannot be read."""
    damage: str
    """The first that was found, as a sentence; empty when every hash is right."""


# ------------------------------------------------------------------------------------------- files


def load_manifest(path: Path) -> weights_pb2.Manifest:
    """A manifest whose hash is right. Raises DataError, FileNotFoundError."""
    try:
        manifest = weights_pb2.Manifest.FromString(path.read_bytes())
    except DecodeError:
        raise DataError(f"{path} is damaged or no manifest: it cannot be decoded.") from None
    if manifest_hash(manifest) != manifest.manifest_hash:
        raise DataError(f"{path} is damaged: the manifest does not have its hash.")
    return manifest


def check_folder(folder: Path) -> Iterator[Checked]:
    """Every version of a store, oldest first; the publisher may be writing to it."""
    found = []
    for path in folder.glob("[!.]*.manifest"):
        try:
            found.append((path.stat().st_mtime, _read(path)))
        except FileNotFoundError:
            continue  # pruned since the folder was listed
    for _, checked in sorted(found, key=lambda it: (it[0], _order(it[1]))):
        if checked.manifest is not None:
            checked = check_version(checked.path, checked.manifest)
        if checked.path.exists():
            yield checked


def _read(path: Path) -> Checked:
    try:
        return Checked(path, load_manifest(path), "")
    except DataError as error:
        return Checked(path, None, str(error))


def _order(checked: Checked) -> tuple[int, int]:
    manifest = checked.manifest
    return (manifest.fence, manifest.version) if manifest else (0, 0)


def check_version(path: Path, manifest: weights_pb2.Manifest) -> Checked:
    """The manifest in ``path`` against itself and against the object beside it."""
    try:
        schema = schema_of(manifest)
        if schema_digest(schema) != manifest.schema_digest:
            raise DataError(f"{path}: the tensors do not have the schema digest.")
        check_manifest(manifest, schema, manifest.schema_digest)
        if path.stem != manifest.manifest_hash.hex():
            raise DataError(f"{path} is not named by its hash, {manifest.manifest_hash.hex()}.")
        _check_object(path.with_suffix(".object"), manifest, schema)
    except (DataError, ServiceError) as error:
        return Checked(path, manifest, str(error))
    return Checked(path, manifest, "")


def _check_object(
    path: Path, manifest: weights_pb2.Manifest, schema: Mapping[str, TensorShape]
) -> None:
    size = encoded_bytes(manifest)
    if not path.is_file():
        raise DataError(f"{path} is missing: version {manifest.version} has no bytes.")
    if (found := path.stat().st_size) != size:
        raise DataError(f"{path} has {found} bytes, and its manifest describes {size}.")
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    sums: Counter[str] = Counter()
    for place in places(manifest):
        entry, part, offset = place
        encoded = data[offset : offset + part.encoded_bytes]
        if xxhash.xxh3_128_digest(encoded.data) != part.xxh3_128:
            raise DataError(f"{_name(path, place)} does not have its hash.")
        try:
            words = _decoded(encoded.data, part, schema[entry.name])
        except CodecError as error:
            raise DataError(f"{_name(path, place)} cannot be decoded: {error}") from None
        if words is not None:
            sums[entry.name] += tensor_sum(words, part.first_element)
    if manifest.base_digest:
        return  # without the base a delta's sums are not known
    for entry in manifest.tensors:
        if digest_bytes(sums[entry.name] & MASK) != entry.digest:
            raise DataError(f"{path}: tensor '{entry.name}' does not have its digest.")


def _name(path: Path, place: Place) -> str:
    part, end = place.part, place.part.first_element + place.part.num_elements
    return (
        f"{path}: the part at byte {place.offset} (tensor '{place.entry.name}', elements "
        f"{part.first_element} to {end - 1})"
    )


def _decoded(data: memoryview, part: weights_pb2.Part, shape: TensorShape) -> np.ndarray | None:
    """The words of a full part, None for a delta. Raises CodecError."""
    codec, dtype = Codec(part.codec), np.dtype(shape.word_type)
    if codec in FULL_CODECS:
        return decode_full(codec, data, part.num_elements, dtype)
    decode_delta(codec, data, part.num_elements, dtype)
    return None


def chain_damage(
    log: Sequence[Mapping[str, Any]], manifests: Sequence[weights_pb2.Manifest]
) -> str:
    """Where one committed version does not lead to the next that is kept; empty if all do.

    A trainer that took over, with another fence, starts from its checkpoint instead.
    """
    kept = {manifest.manifest_hash.hex(): manifest for manifest in manifests}
    committed = {
        event["manifest_hash"]: event["version"] for event in log if event["event"] == "committed"
    }
    before: weights_pb2.Manifest | None = None
    *_, newest = committed or [""]
    for name, version in committed.items():
        manifest = kept.get(name)
        if manifest is None and (before is not None or name == newest):
            return f"version {version} is committed, and its manifest {name}.manifest is missing."
        if manifest is None:
            continue  # pruned
        if (
            before is not None
            and manifest.base_digest
            and (before.run_id, before.fence) == (manifest.run_id, manifest.fence)
            and manifest.base_digest != before.result_digest
        ):
            return (
                f"version {version} starts from {manifest.base_digest}, and the committed version "
                f"before it, {before.version}, ends at {before.result_digest}."
            )
        before = manifest
    return ""


# ---------------------------------------------------------------------------------------- replicas


def audited(address: str) -> weights_pb2.GetWeightsResponse:
    """What a replica serves, once it has computed its digest again. Raises KleashError."""
    with WeightsClient(address) as replica:
        try:
            return replica.get_weights(audit=True)
        except ServiceError as error:
            if error.reason != "DIGEST_MISMATCH":
                raise
            raise KleashError(f"{address}: {error}") from None


def model_folder_digest(folder: Path, served: weights_pb2.GetWeightsResponse) -> str:
    """Digest of a Hugging Face folder's weights in the data type that the replica serves.

    Raises UserError for a folder that cannot be loaded, KleashError for another model.
    """
    from kleash.lm.digest import canonical_tensors
    from kleash.lm.load import load_causal_lm
    from kleash.ppo.publish import served_schema, words_of

    tensors = canonical_tensors(load_causal_lm(folder))
    try:
        schema, dtype = served_schema(tensors, served.schema_digest)
    except PreconditionFailed:
        raise KleashError(
            f"the model in {folder} has other tensors than the replica serves, in every data type."
        ) from None
    words = words_of(tensors, dtype)
    return digest_of(schema, {name: tensor_sum(words(name).words) for name in schema})
