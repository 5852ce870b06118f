"""Receives a published version: manifest, chunks, checks, then all of it between two decode steps.

    begin   manifest fits this model; fence and version in order        nothing allocated before
    add     each chunk: range, xxh3-64, no overlap ──► staging buffer   old weights serve
    verify  complete; xxh3-128 of every tensor; finite                  old weights serve
    apply   in the decoding thread: copy into the live tensors          all of it, or nothing

Every failure leaves the served weights as they were. A publish with a greater fence takes the
place of one that is under way: a new trainer does not wait for a dead one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from kleash.base import metrics
from kleash.lm.digest import DTYPE_NAMES, canonical_tensors, combine_digests, schema_digest
from kleash.policy.decode_loop import DecodeLoop
from kleash.policy.staging import Staging, buffer_size
from kleash.rpc.errors import (
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    PreconditionFailed,
)
from kleash.weights.v1 import weights_pb2

BUSY_RETRY_S = 1.0


@dataclass(frozen=True)
class Served:
    """The weights in use."""

    run_id: str
    fence: int
    version: int
    digest: str


class WeightsReceiver:
    """Guards one model's weights. ``begin`` to ``apply`` run for one publish at a time."""

    def __init__(
        self,
        model: Any,
        loop: DecodeLoop,
        *,
        digest: str,
        on_served: Callable[[str, str], None],
    ) -> None:
        """Args:
        digest: of the weights that the model has now.
        on_served: called with the old and the new digest after a version was applied.
        """
        self._on_served = on_served
        self._tensors = canonical_tensors(model)
        self._parameter_names = {name for name, _ in model.named_parameters()}
        self._schema_digest = schema_digest(self._tensors)
        self._loop = loop
        self._served = Served("", 0, 0, digest)
        self._fence = 0
        self._lock = threading.Lock()
        self._staging: Staging | None = None
        self._buffer: np.ndarray | None = None

    def get_weights(self) -> weights_pb2.GetWeightsResponse:
        """What is served now."""
        served = self._served
        return weights_pb2.GetWeightsResponse(
            run_id=served.run_id,
            fence=self._fence,
            version=served.version,
            digest=served.digest,
            schema_digest=self._schema_digest,
        )

    def begin(self, manifest: weights_pb2.Manifest) -> Staging | None:
        """Check a manifest and prepare for its chunks; None when the version is served already.

        Raises InvalidRequest, PreconditionFailed, PermissionDenied or Overloaded.
        """
        with self._lock:
            self._check_order(manifest)
            if self._is_served(manifest):
                return None
            self._check_schema(manifest)
            running = self._staging
            if running is not None and (
                running.is_applying or manifest.fence <= running.manifest.fence
            ):
                raise Overloaded(
                    f"version {running.manifest.version} of run '{running.manifest.run_id}' is "
                    "being published; try again when that is over.",
                    reason="PUBLISH_IN_PROGRESS",
                    retry_after_s=BUSY_RETRY_S,
                )
            self._fence = manifest.fence
            if self._buffer is None:
                # Kept for the next version: fresh pages would cost more than the copy.
                self._buffer = np.empty(buffer_size(manifest), np.uint8)
            self._staging = Staging(manifest, self._buffer)
            return self._staging

    def add(self, staging: Staging, chunk: weights_pb2.Chunk) -> None:
        """Take a chunk in."""
        with self._lock:
            self._check_current(staging)
            staging.add(chunk)

    def verify(self, staging: Staging) -> None:
        """Check that everything came and is what the manifest promised."""
        if sentence := staging.missing():
            raise InvalidRequest(
                f"the publish of version {staging.manifest.version} is incomplete: {sentence}; "
                "send every chunk before the end of the stream.",
                field="chunk",
            )
        for index, entry in enumerate(staging.manifest.tensors):
            data = staging.tensor_bytes(index)
            if xxhash.xxh3_128_digest(data.data) != entry.xxh3_128:
                raise PreconditionFailed(
                    f"tensor '{entry.name}' does not have the checksum of the manifest; "
                    "publish again.",
                    reason="DIGEST_MISMATCH",
                    metadata={"layer": "tensor", "tensor": entry.name},
                )
            tensor = self._staged(staging, entry.name, index)
            if entry.name in self._parameter_names and tensor.is_floating_point():
                low, high = tensor.aminmax() if tensor.numel() else (tensor.sum(), tensor.sum())
                if not (torch.isfinite(low) and torch.isfinite(high)):
                    raise PreconditionFailed(
                        f"tensor '{entry.name}' of version {staging.manifest.version} holds NaN or "
                        "infinity; the training has diverged.",
                        reason="NON_FINITE",
                        metadata={"tensor": entry.name},
                    )

    def apply(self, staging: Staging) -> weights_pb2.PublishResponse:
        """Make a verified version the served one. Runs in the decoding thread."""
        begin = time.perf_counter_ns()
        manifest = staging.manifest
        with self._lock:
            self._check_current(staging)
            staging.is_applying = True
        try:
            with torch.no_grad():
                for index, entry in enumerate(manifest.tensors):
                    self._tensors[entry.name].copy_(self._staged(staging, entry.name, index))
            self._loop.decoder.weights_version = manifest.version
            old, self._served = self._served, _served_by(manifest)
        finally:
            with self._lock:
                self._staging = None
        pause_ns = time.perf_counter_ns() - begin
        self._on_served(old.digest, manifest.result_digest)
        metrics.POLICY_WEIGHTS_VERSION.set(manifest.version)
        metrics.WEIGHTS_UPDATE_BYTES.inc(staging.num_bytes)
        metrics.WEIGHTS_UPDATE_SECONDS.observe(time.monotonic() - staging.began)
        return weights_pb2.PublishResponse(
            version=manifest.version,
            digest=manifest.result_digest,
            pause_ns=pause_ns,
            received_bytes=staging.num_bytes,
        )

    def finish(self, staging: Staging) -> None:
        """The publish is over, one way or the other; the buffer is free unless it is being read."""
        with self._lock:
            if self._staging is staging and not staging.is_applying:
                self._staging = None

    def already_committed(self) -> weights_pb2.PublishResponse:
        """The answer to a repeated publish."""
        served = self._served
        return weights_pb2.PublishResponse(
            version=served.version, digest=served.digest, already_committed=True
        )

    def publish(
        self, manifest: weights_pb2.Manifest, chunks: Iterable[weights_pb2.Chunk]
    ) -> weights_pb2.PublishResponse:
        """The whole of it, blocking."""
        staging = self.begin(manifest)
        if staging is None:
            return self.already_committed()
        try:
            for chunk in chunks:
                self.add(staging, chunk)
            self.verify(staging)
            return self._loop.run(lambda: self.apply(staging)).result()
        finally:
            self.finish(staging)

    def _check_order(self, manifest: weights_pb2.Manifest) -> None:
        """Fence and version, against what was seen and what is served."""
        served = self._served
        if manifest.fence < self._fence:
            raise PermissionDenied(
                f"fence {manifest.fence} of run '{manifest.run_id}' is lower than {self._fence}, "
                "which this replica has seen: another trainer has taken over; stop this one.",
                reason="STALE_FENCE",
                metadata={"fence": str(manifest.fence), "seen": str(self._fence)},
            )
        if manifest.fence > served.fence or self._is_served(manifest):
            return
        seen = {"version": str(manifest.version), "served": str(served.version)}
        if manifest.version == served.version:
            raise PreconditionFailed(
                f"version {manifest.version} is served already with digest {served.digest} of run "
                f"'{served.run_id}' and not {manifest.result_digest}; publish a new version.",
                reason="VERSION_CONFLICT",
                metadata=seen,
            )
        if manifest.version < served.version:
            raise PreconditionFailed(
                f"version {manifest.version} is older than {served.version}, which is served; "
                "publish a newer version or take a greater fence.",
                reason="VERSION_NOT_NEWER",
                metadata=seen,
            )

    def _is_served(self, manifest: weights_pb2.Manifest) -> bool:
        return self._served == _served_by(manifest)

    def _check_schema(self, manifest: weights_pb2.Manifest) -> None:
        """Names, shapes, types, sizes and digests, before anything is allocated for them."""
        given = {entry.name: (tuple(entry.shape), entry.dtype) for entry in manifest.tensors}
        own = {
            name: (tuple(tensor.shape), DTYPE_NAMES[tensor.dtype])
            for name, tensor in self._tensors.items()
        }
        if (
            manifest.schema_digest != self._schema_digest
            or given != own
            or len(manifest.tensors) != len(own)
        ):
            raise PreconditionFailed(
                f"the published tensors do not fit the served model: {_difference(given, own)}; "
                "publish a model of the same architecture and data type.",
                reason="SCHEMA_MISMATCH",
                metadata={"published": manifest.schema_digest, "served": self._schema_digest},
            )
        for index, entry in enumerate(manifest.tensors):
            field = f"manifest.tensors[{index}]"
            if entry.codec != weights_pb2.CODEC_FULL:
                raise InvalidRequest(
                    f"{field}.codec is {entry.codec}; this replica takes CODEC_FULL "
                    f"({weights_pb2.CODEC_FULL}).",
                    field=f"{field}.codec",
                )
            size = self._tensors[entry.name].nbytes
            if entry.encoded_bytes != size:
                raise InvalidRequest(
                    f"{field}.encoded_bytes is {entry.encoded_bytes} and tensor '{entry.name}' "
                    f"has {size}.",
                    field=f"{field}.encoded_bytes",
                )
        digest = combine_digests(
            (entry.name, entry.dtype, tuple(entry.shape), entry.xxh3_128)
            for entry in manifest.tensors
        )
        if manifest.result_digest != digest:
            raise PreconditionFailed(
                f"manifest.result_digest is {manifest.result_digest}, and the tensors of the "
                f"manifest make {digest}.",
                reason="DIGEST_MISMATCH",
                field="manifest.result_digest",
                metadata={"layer": "model"},
            )

    def _check_current(self, staging: Staging) -> None:
        if self._staging is not staging:
            raise PermissionDenied(
                f"the publish of version {staging.manifest.version} with fence "
                f"{staging.manifest.fence} was given up: a trainer with fence {self._fence} has "
                "taken over; stop this one.",
                reason="STALE_FENCE",
                metadata={"fence": str(staging.manifest.fence), "seen": str(self._fence)},
            )

    def _staged(self, staging: Staging, name: str, index: int) -> torch.Tensor:
        live = self._tensors[name]
        return torch.from_numpy(staging.tensor_bytes(index)).view(live.dtype).reshape(live.shape)


def _served_by(manifest: weights_pb2.Manifest) -> Served:
    return Served(manifest.run_id, manifest.fence, manifest.version, manifest.result_digest)


def _difference(
    given: dict[str, tuple[tuple[int, ...], str]], own: dict[str, tuple[tuple[int, ...], str]]
) -> str:
    """The first tensor that differs."""
    for name in sorted(given.keys() | own.keys()):
        if given.get(name) == own.get(name):
            continue
        if name not in given:
            return f"'{name}' is missing"
        if name not in own:
            return f"'{name}' is not in it"
        (shape, dtype), (own_shape, own_dtype) = given[name], own[name]
        return f"'{name}' is {dtype} {list(shape)} and here {own_dtype} {list(own_shape)}"
    return "the digest or the number of its tensors differs"
