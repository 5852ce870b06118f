"""Manifests: what a version is made of, its hash, and the checks that need no tensors.

run_id, fence, version        who published what
base_digest ──► result_digest the weights before and after; an anchor has no base
tensors[].digest              every tensor after the version is applied
tensors[].parts[]             runs of elements that change, encoded, one after another in the object
manifest_hash                 of all of it; also the id of the object
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import xxhash

from kleash.rpc.errors import InvalidRequest, PreconditionFailed
from kleash.weights.codec import Codec, Encoded
from kleash.weights.digest import combine_digests
from kleash.weights.v1 import weights_pb2

WORD_TYPES: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "F32": (np.uint32, 1),
    "BF16": (np.uint16, 1),
    "F16": (np.uint16, 1),
    "F64": (np.uint32, 2),
    "I64": (np.uint32, 2),
    "I32": (np.uint32, 1),
    "U8": (np.uint8, 1),
    "BOOL": (np.uint8, 1),
}
"""How a data type's bits are seen: as unsigned words of this type, so many for each element."""

EXPONENTS = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}
"""Bits that are all set in NaN and infinity alone."""

FULL_CODECS = (Codec.FULL, Codec.FULL_PLANES)


class TensorShape(NamedTuple):
    """Shape and data type of a tensor, as a schema names them."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_words(self) -> int:
        """Words of the tensor."""
        return math.prod(self.shape) * WORD_TYPES[self.dtype][1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.num_words * np.dtype(self.word_type).itemsize

    @property
    def word_type(self) -> type[np.unsignedinteger]:
        """Type of its words."""
        return WORD_TYPES[self.dtype][0]


Schema = Mapping[str, TensorShape]
"""Tensors by checkpoint name, sorted."""


class Place(NamedTuple):
    """A part, the tensor it belongs to, and where its bytes lie in the object."""

    entry: weights_pb2.TensorEntry
    part: weights_pb2.Part
    offset: int


def schema_digest(schema: Schema) -> str:
    """Digest of names, shapes and data types: equal for all versions of one model."""
    return combine_digests((name, it.dtype, it.shape, b"") for name, it in schema.items())


def places(manifest: weights_pb2.Manifest) -> Iterator[Place]:
    """Every part, in the order of the object."""
    offset = 0
    for entry in manifest.tensors:
        for part in entry.parts:
            yield Place(entry, part, offset)
            offset += part.encoded_bytes


def encoded_bytes(manifest: weights_pb2.Manifest) -> int:
    """Bytes of the object."""
    return sum(part.encoded_bytes for entry in manifest.tensors for part in entry.parts)


def num_changed(manifest: weights_pb2.Manifest) -> int:
    """Elements whose bits change; in a full codec all of them count."""
    return sum(part.num_changed for entry in manifest.tensors for part in entry.parts)


def schema_of(manifest: weights_pb2.Manifest) -> dict[str, TensorShape]:
    """What the manifest says of the tensors. Raises InvalidRequest for an unknown data type."""
    for index, entry in enumerate(manifest.tensors):
        if entry.dtype not in WORD_TYPES:
            raise InvalidRequest(
                f"manifest.tensors[{index}].dtype is '{entry.dtype}'; it is one of "
                f"{', '.join(WORD_TYPES)}.",
                field=f"manifest.tensors[{index}].dtype",
            )
    return {it.name: TensorShape(tuple(it.shape), it.dtype) for it in manifest.tensors}


def dense_bytes(schema: Schema) -> int:
    """Bytes of the weights themselves."""
    return sum(shape.num_bytes for shape in schema.values())


def describe_part(made: Encoded, first_element: int, num_elements: int) -> weights_pb2.Part:
    """The manifest's entry for an encoded run of elements."""
    return weights_pb2.Part(
        first_element=first_element,
        num_elements=num_elements,
        codec=int(made.codec),  # pyright: ignore[reportArgumentType]
        encoded_bytes=len(made.data),
        num_changed=made.num_changed,
        xxh3_128=xxhash.xxh3_128_digest(made.data),
    )


def manifest_hash(manifest: weights_pb2.Manifest) -> bytes:
    """SHA-256 of every field but ``manifest_hash``, each with its length: 32 bytes.

    Protobuf's own bytes are not canonical over languages and versions, so they are not hashed.
    """
    sha = hashlib.sha256(b"kleash.weights.v1.Manifest")

    def add(*values: str | int | bytes) -> None:
        for value in values:
            data = value if isinstance(value, bytes) else str(value).encode()
            sha.update(len(data).to_bytes(8, "little") + data)

    add(manifest.run_id, manifest.fence, manifest.version, manifest.base_version)
    add(manifest.base_digest, manifest.result_digest, manifest.schema_digest)
    add(len(manifest.tensors))
    for entry in manifest.tensors:
        add(entry.name, ",".join(map(str, entry.shape)), entry.dtype, entry.digest)
        add(len(entry.parts))
        for part in entry.parts:
            add(part.first_element, part.num_elements, part.codec, part.encoded_bytes)
            add(part.num_changed, part.xxh3_128)
    return sha.digest()


def key_of(manifest: weights_pb2.Manifest) -> weights_pb2.VersionKey:
    """The key of the version that the manifest publishes."""
    return weights_pb2.VersionKey(
        run_id=manifest.run_id,
        fence=manifest.fence,
        version=manifest.version,
        manifest_hash=manifest.manifest_hash,
        digest=manifest.result_digest,
    )


def describe_key(key: weights_pb2.VersionKey) -> str:
    """For sentences: "version 7 of run 'x'"."""
    return f"version {key.version} of run '{key.run_id}'"


def result_digest(manifest: weights_pb2.Manifest) -> str:
    """The model digest that the tensors' digests make."""
    return combine_digests(
        (entry.name, entry.dtype, tuple(entry.shape), entry.digest) for entry in manifest.tensors
    )


def check_manifest(manifest: weights_pb2.Manifest, own: Schema, own_digest: str) -> None:
    """Everything about a manifest that can be checked before a byte of it is fetched.

    Raises PreconditionFailed for another schema or a digest that does not fit, InvalidRequest with
    the field's path for parts that do not cover their tensor.
    """
    given = schema_of(manifest)
    is_same = given == dict(own) and len(manifest.tensors) == len(own)
    if not is_same or manifest.schema_digest != own_digest:
        raise PreconditionFailed(
            f"the published tensors do not fit the served model: {_difference(given, own)}; "
            "publish a model of the same architecture and data type.",
            reason="SCHEMA_MISMATCH",
            metadata={"published": manifest.schema_digest, "served": own_digest},
        )
    if manifest.manifest_hash != manifest_hash(manifest):
        raise PreconditionFailed(
            f"the manifest of version {manifest.version} does not have its hash; send it again.",
            reason="DIGEST_MISMATCH",
            field="manifest.manifest_hash",
            metadata={"layer": "manifest"},
        )
    if manifest.result_digest != (made := result_digest(manifest)):
        raise PreconditionFailed(
            f"manifest.result_digest is {manifest.result_digest}, and the tensors of the "
            f"manifest make {made}.",
            reason="DIGEST_MISMATCH",
            field="manifest.result_digest",
            metadata={"layer": "model"},
        )
    for index, entry in enumerate(manifest.tensors):
        _check_parts(manifest, entry, f"manifest.tensors[{index}]", given[entry.name])


def _check_parts(
    manifest: weights_pb2.Manifest, entry: weights_pb2.TensorEntry, field: str, shape: TensorShape
) -> None:
    next_element = 0
    for number, part in enumerate(entry.parts):
        path = f"{field}.parts[{number}]"
        if part.codec not in list(Codec):
            raise InvalidRequest(
                f"{path}.codec is {part.codec}; this replica takes "
                f"{', '.join(f'{codec.name} ({codec})' for codec in Codec)}.",
                field=f"{path}.codec",
            )
        if not manifest.base_digest and part.codec not in FULL_CODECS:
            raise InvalidRequest(
                f"{path}.codec is {Codec(part.codec).name} and the manifest names no base; an "
                "anchor holds full parts only.",
                field=f"{path}.codec",
            )
        if part.first_element < next_element or not part.num_elements:
            raise InvalidRequest(
                f"{path} covers {part.num_elements} elements from {part.first_element} on, and the "
                f"part before it ends at {next_element}; send each element once, in order.",
                field=f"{path}.first_element",
            )
        next_element = part.first_element + part.num_elements
        most = part.num_elements * np.dtype(shape.word_type).itemsize
        if part.codec == Codec.FULL and part.encoded_bytes != most:
            raise InvalidRequest(
                f"{path}.encoded_bytes is {part.encoded_bytes}; {part.num_elements} elements of "
                f"{shape.dtype} have {most}.",
                field=f"{path}.encoded_bytes",
            )
    if next_element > shape.num_words:
        raise InvalidRequest(
            f"the parts of tensor '{entry.name}' end at element {next_element}, and it has "
            f"{shape.num_words}.",
            field=f"{field}.parts",
        )
    covered = sum(part.num_elements for part in entry.parts)
    if not manifest.base_digest and covered != shape.num_words:
        raise InvalidRequest(
            f"the parts of tensor '{entry.name}' hold {covered} of its {shape.num_words} "
            "elements; an anchor holds all of them.",
            field=f"{field}.parts",
        )


def _difference(given: Schema, own: Schema) -> str:
    """The first tensor that differs."""
    for name in sorted(given.keys() | own.keys()):
        if given.get(name) == own.get(name):
            continue
        if name not in given:
            return f"'{name}' is missing"
        if name not in own:
            return f"'{name}' is not in it"
        one, other = given[name], own[name]
        return (
            f"'{name}' is {one.dtype} {list(one.shape)} and here {other.dtype} {list(other.shape)}"
        )
    return "the digest or the number of its tensors differs"
