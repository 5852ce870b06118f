"""Sends the policy's weights to every replica: a manifest, then 1 MiB chunks, in parallel.

The digest is that of the bits that are served: a trainer in float32 casts to the replicas' data
type first. Nothing here changes the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from kleash.lm.digest import (
    DTYPE_NAMES,
    canonical_tensors,
    combine_digests,
    schema_digest,
    tensor_bytes,
)
from kleash.ppo.services import Weights
from kleash.rpc.errors import InternalError, PreconditionFailed
from kleash.weights.v1 import weights_pb2

CHUNK_BYTES = 1 << 20
"""Larger chunks are slower in Python's gRPC: each is a fresh allocation."""

CASTS = (None, torch.bfloat16, torch.float16, torch.float32)
"""Data types that a replica may serve; None is the trainer's own."""


@dataclass(frozen=True)
class PublishReport:
    """A version that every replica serves."""

    version: int
    digest: str
    """Digest of the served weights."""
    seconds: float
    """From the first hash to the last replica's answer."""
    bytes: int
    """Sent to all replicas together; replicas that served the version already take none."""
    pause_s: float
    """Longest time for which a replica did not generate."""


class Publisher:
    """Publishes versions of one run. Not for two threads at a time."""

    def __init__(self, weights_clients: Sequence[Weights], run_id: str, fence: int) -> None:
        """``fence`` is this trainer's epoch: replicas refuse a lower one than they have seen."""
        self._clients = list(weights_clients)
        self._run_id = run_id
        self._fence = fence

    def publish(self, model: torch.nn.Module, version: int) -> PublishReport:
        """Put the model's weights in place on every replica, as ``version``.

        The model must not change meanwhile. Publishing the same version again is harmless: replicas
        that serve it say so, one that was restarted gets it.

        Raises the first replica's ServiceError; a replica that failed serves what it did before.
        """
        begin = time.monotonic()
        with ThreadPoolExecutor(len(self._clients), "publish") as threads:
            schemas = {
                served.schema_digest
                for served in threads.map(lambda client: client.get_weights(), self._clients)
            }
            if len(schemas) > 1:
                raise PreconditionFailed(
                    "the policy replicas serve models of different shapes or data types; "
                    "start them with the same model and dtype.",
                    reason="SCHEMA_MISMATCH",
                )
            tensors = cast_to_schema(canonical_tensors(model), schemas.pop())
            manifest = build_manifest(
                tensors, run_id=self._run_id, fence=self._fence, version=version
            )
            responses = list(
                threads.map(lambda client: client.publish(manifest, chunks(tensors)), self._clients)
            )
        for response in responses:
            if (response.version, response.digest) != (version, manifest.result_digest):
                raise InternalError(
                    f"a policy replica serves version {response.version} with digest "
                    f"{response.digest} after the publish of version {version} with digest "
                    f"{manifest.result_digest}; does another trainer publish to it?"
                )
        return PublishReport(
            version=version,
            digest=manifest.result_digest,
            seconds=time.monotonic() - begin,
            bytes=sum(response.received_bytes for response in responses),
            pause_s=max(response.pause_ns for response in responses) / 1e9,
        )


def cast_to_schema(tensors: Mapping[str, torch.Tensor], wanted: str) -> dict[str, torch.Tensor]:
    """The tensors in the data type whose schema digest is ``wanted``; not copied when it is theirs.

    Raises PreconditionFailed when no data type fits.
    """
    for dtype in CASTS:
        # On the meta device a cast costs nothing, and the schema is names, shapes and types alone.
        cast = {name: _cast(tensor.to("meta"), dtype) for name, tensor in tensors.items()}
        if schema_digest(cast) == wanted:
            return {name: _cast(tensor, dtype) for name, tensor in tensors.items()}
    raise PreconditionFailed(
        "the policy service's model has other tensors than the trainer's; serve the checkpoint "
        "that the trainer starts from.",
        reason="SCHEMA_MISMATCH",
    )


def build_manifest(
    tensors: Mapping[str, torch.Tensor], *, run_id: str, fence: int, version: int
) -> weights_pb2.Manifest:
    """Describe a full version of ``tensors``, sorted by name."""
    entries = []
    for name, tensor in tensors.items():
        data = tensor_bytes(tensor)
        entries.append(
            weights_pb2.TensorEntry(
                name=name,
                shape=tensor.shape,
                dtype=DTYPE_NAMES[tensor.dtype],
                codec=weights_pb2.CODEC_FULL,
                encoded_bytes=data.nbytes,
                xxh3_128=xxhash.xxh3_128_digest(data.data),
            )
        )
    return weights_pb2.Manifest(
        run_id=run_id,
        fence=fence,
        version=version,
        result_digest=combine_digests(
            (entry.name, entry.dtype, tuple(entry.shape), entry.xxh3_128) for entry in entries
        ),
        schema_digest=schema_digest(tensors),
        tensors=entries,
    )


def chunks(tensors: Mapping[str, torch.Tensor]) -> Iterator[weights_pb2.Chunk]:
    """The bytes of ``tensors`` in the order of their manifest."""
    for index, tensor in enumerate(tensors.values()):
        data: np.ndarray = tensor_bytes(tensor)
        for offset in range(0, len(data), CHUNK_BYTES):
            part = data[offset : offset + CHUNK_BYTES].tobytes()
            yield weights_pb2.Chunk(
                tensor_index=index,
                offset=offset,
                xxh3_64=xxhash.xxh3_64_intdigest(part),
                data=part,
            )


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
