"""The publisher beside the trainer: a shadow of what is served, versions on disk, commits.

    policy ──cast, tensor by tensor─► new bits ─┐
                                                ├─► delta ─► store ─► two-phase commit over replicas
    shadow: bits of the last committed version ─┘                              │
       ▲                                                                       ▼
       └──────────────────── advanced only when the version is committed ◄── canary agrees

Nothing here changes the model. The shadow is the only copy; encoding holds one part at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kleash.base import tracing
from kleash.lm.digest import DTYPE_NAMES, canonical_tensors, schema_digest, tensor_words
from kleash.ppo.config import PublishConfig
from kleash.rpc.errors import InternalError, PreconditionFailed, ServiceError, Unavailable
from kleash.weights.coordinator import (
    CANARY_MISMATCH,
    Check,
    Coordinator,
    FleetSettings,
    Replica,
    Replicas,
    describe_replica,
)
from kleash.weights.encoder import EncodedShards, Shadow, Shard, encode_shards, merge
from kleash.weights.manifest import Schema, TensorShape, dense_bytes, encoded_bytes, num_changed
from kleash.weights.store import Store
from kleash.weights.stored import Stored
from kleash.weights.v1 import weights_pb2

logger = logging.getLogger(__name__)

CASTS = (None, torch.bfloat16, torch.float16, torch.float32)
"""Data types that a replica may serve; None is the trainer's own."""

IN_FLIGHT = {
    "drain": weights_pb2.IN_FLIGHT_DRAIN,
    "keep": weights_pb2.IN_FLIGHT_KEEP,
    "reprefill": weights_pb2.IN_FLIGHT_REPREFILL,
    "abort_partial": weights_pb2.IN_FLIGHT_ABORT_PARTIAL,
}

CANARY_TOLERANCE = {"F32": 0.01, "BF16": 0.5, "F16": 0.1}
"""Nats between the trainer's and a replica's log-prob of a token, by the served data type. Other
weights are off by far more than another kernel's rounding; the digest has checked the bits."""


@dataclass(frozen=True)
class PublishReport:
    """A version that every replica that committed serves."""

    version: int
    digest: str
    """Digest of the served weights."""
    seconds: float
    """From the first comparison with the shadow to the last replica's answer."""
    encode_s: float
    """Of that, until the version was stored."""
    bytes: int
    """Encoded bytes of the version, sent to each replica that served the version before."""
    dense_bytes: int
    """Bytes of the weights."""
    changed_fraction: float
    """Share of the elements whose bits changed."""
    pause_s: float
    """Longest time for which a replica did not generate."""
    replicas: tuple[int, ...]
    """Numbers of the replicas that serve the version."""

    def figures(self) -> dict[str, float]:
        """For metrics.jsonl; docs/metrics.md defines them."""
        return {
            "publish_pause_s": self.pause_s,
            "publish_bytes": self.bytes,
            "publish_changed_fraction": self.changed_fraction,
            "publish_replicas": len(self.replicas),
        }


@dataclass(frozen=True, eq=False)
class Canary:
    """A fixed sequence and the trainer's own log-probs of it."""

    ids: np.ndarray
    """int32, at least two."""
    log_probs: Callable[[np.ndarray], np.ndarray]
    """(n,) ids to (n - 1,) float32 log-probs of the policy as it is now, at temperature 1."""


@dataclass(frozen=True, eq=False)
class _Pending:
    """A version that was encoded and is not committed yet."""

    manifest: weights_pb2.Manifest
    sums: dict[str, int]
    encode_s: float


class Publisher:
    """Publishes versions of one run. One thread publishes; replicas may plan meanwhile."""

    def __init__(
        self,
        replicas: Replicas,
        store: Store,
        *,
        run_id: str,
        fence: int,
        config: PublishConfig | None = None,
        store_address: str = "",
        canary: Canary | None = None,
        may_publish: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        replicas: by number; with an elastic fleet they change between two calls.
        fence: this trainer's epoch; replicas refuse a lower one than they have seen.
        store_address: where replicas in other processes reach ``store``.
        canary: compared on every replica after each commit.
        may_publish: raises a ServiceError when another trainer holds the fleet.
        """
        config = config or PublishConfig()
        self.store = store
        self._run_id = run_id
        self._fence = fence
        self._canary = canary
        self._coordinator = Coordinator(
            replicas, store, store_address, _settings(config), may_publish
        )
        self._may_publish = may_publish
        self._shadow: Shadow | None = None
        self._base = (0, "")
        self._pending: _Pending | None = None
        self._check: Check = partial(self._check_canary, None)
        # Of the shadow: anchors are made from it in the threads that plan.
        self._lock = threading.Lock()
        store.make_anchor = self._make_anchor

    @tracing.measured("publish")
    def publish(self, model: torch.nn.Module, version: int) -> PublishReport:
        """Put the model's weights in place on the replicas, as ``version``.

        The model must not change meanwhile, nor until a publish that raised is repeated. Publishing
        the committed version again brings replicas to it that lost it.

        Raises a replica's ServiceError when too few replicas follow; all serve what they did.
        """
        begin = time.monotonic()
        self._may_publish()
        head = self.store.head
        if head is not None and (head.fence, head.version) == (self._fence, version):
            return self._repeat(head, begin)
        pending = self._encode(model, version)
        manifest = pending.manifest
        self._check = partial(self._check_canary, self._expected_canary())
        try:
            report = self._coordinator.publish(manifest, self._check)
        except PreconditionFailed:
            # Maybe the file was damaged: another attempt encodes the version again.
            self.store.discard(manifest.manifest_hash)
            self._pending = None
            raise
        self._advance(pending)
        shapes = self._schema.values()
        return PublishReport(
            version=version,
            digest=manifest.result_digest,
            seconds=time.monotonic() - begin,
            encode_s=pending.encode_s,
            bytes=encoded_bytes(manifest),
            dense_bytes=dense_bytes(self._schema),
            changed_fraction=num_changed(manifest) / max(sum(its.num_words for its in shapes), 1),
            pause_s=max(its.pause_ns for its in report.committed.values()) / 1e9,
            replicas=tuple(sorted(report.committed)),
        )

    def ensure(self, replica: int, version: int) -> None:
        """Bring one replica to the committed ``version`` unless it serves it.

        Raises PermissionDenied when another trainer has taken the replica over.
        """
        head = self.store.head
        if head is None or head.version != version:
            raise PreconditionFailed(
                f"version {version} is not published; {head.version if head else 'none'} is.",
                reason="NOT_PUBLISHED",
            )
        client = self._coordinator.replicas.get(replica)
        if client is None:
            raise Unavailable(f"policy replica {replica} has left.", reason="NO_REPLICA")
        if client.get_weights().served != head:
            self._may_publish()
            logger.warning(
                "%s does not serve version %d; bringing it there",
                describe_replica(replica, client),
                version,
            )
            self._coordinator.catch_up(replica, head, self._check)

    @property
    def _schema(self) -> Schema:
        assert self._shadow is not None
        return self._shadow.schema

    def _repeat(self, head: weights_pb2.VersionKey, begin: float) -> PublishReport:
        """Bring those replicas to the committed version that do not serve it."""
        served, failures = [], []
        fleet = list(self._coordinator.replicas)
        needed = self._coordinator.needed(len(fleet))
        for index in fleet:
            try:
                self.ensure(index, head.version)
                served.append(index)
            except ServiceError as error:
                failures.append(error)
        if len(served) < needed:
            raise failures[0]
        return PublishReport(
            version=head.version,
            digest=head.digest,
            seconds=time.monotonic() - begin,
            encode_s=0.0,
            bytes=0,
            dense_bytes=dense_bytes(self._schema),
            changed_fraction=0.0,
            pause_s=0.0,
            replicas=tuple(served),
        )

    @tracing.measured("encode")
    def _encode(self, model: torch.nn.Module, version: int) -> _Pending:
        """The version in the store, as a change of the shadow."""
        begin = time.monotonic()
        if self._pending is not None:
            if self._pending.manifest.version == version:
                return self._pending
            self.store.discard(self._pending.manifest.manifest_hash)
            self._pending = None
        tensors = canonical_tensors(model)
        if self._shadow is None:
            schema, dtype = served_schema(tensors, self._served_schema_digest())
            self._dtype = dtype
            self._shadow = Shadow.of(schema, words_of(tensors, dtype))
            # The first version is the weights as they are: an empty change of themselves.
            self._base = (max(version - 1, 0), self._shadow.digest)
        made = encode_shards(
            self._shadow.schema, self._shadow, words_of(tensors, self._dtype), self.store.folder
        )
        manifest, file = self._merge(made, version, self._base)
        self.store.put(manifest, file)
        self._pending = _Pending(manifest, made.sums, time.monotonic() - begin)
        return self._pending

    def _merge(
        self, made: EncodedShards, version: int, base: tuple[int, str]
    ) -> tuple[weights_pb2.Manifest, Path]:
        return merge(
            self._schema,
            [made],
            self.store.folder,
            run_id=self._run_id,
            fence=self._fence,
            version=version,
            base=base,
        )

    def _advance(self, pending: _Pending) -> None:
        """The version is committed: the shadow becomes it."""
        manifest = pending.manifest
        with self._lock:
            assert self._shadow is not None
            if encoded_bytes(manifest):
                path = self.store.folder / f"{manifest.manifest_hash.hex()}.object"
                self._shadow.advance(manifest, np.memmap(path, np.uint8, "r"), pending.sums)
            self._base = (manifest.version, manifest.result_digest)
            self._pending = None

    def _make_anchor(self, digest: str) -> Stored | None:
        """All weights of the shadow as a version of their own, if they have this digest."""
        with self._lock:
            if self._shadow is None or self._base[1] != digest:
                return None
            shards = self._shadow.shards
            made = encode_shards(self._schema, None, shards.__getitem__, self.store.folder)
            manifest, file = self._merge(made, self._base[0], (0, ""))
            return self.store.put(manifest, file)

    def _served_schema_digest(self) -> str:
        """What the replicas serve, asked of all of them, or of as many as must commit."""
        replicas = dict(self._coordinator.replicas)
        needed = self._coordinator.needed(len(replicas))
        schemas, failures = [], []
        with ThreadPoolExecutor(len(replicas), "publish") as threads:
            for answer in [threads.submit(its.get_weights) for its in replicas.values()]:
                try:
                    schemas.append(answer.result().schema_digest)
                except ServiceError as error:
                    failures.append(error)
        if len(schemas) < needed:
            raise failures[0]
        schemas = set(schemas)
        if len(schemas) > 1:
            raise PreconditionFailed(
                "the policy replicas serve models of different shapes or data types; "
                "start them with the same model and dtype.",
                reason="SCHEMA_MISMATCH",
            )
        return schemas.pop()

    def _expected_canary(self) -> np.ndarray | None:
        return None if self._canary is None else self._canary.log_probs(self._canary.ids)

    def _check_canary(self, expected: np.ndarray | None, index: int, replica: Replica) -> None:
        """The replica computes what the trainer computes, or the version is taken back."""
        if expected is None or self._canary is None:
            return
        with tracing.span("canary", replica=index):
            answer = replica.check_canary(self._canary.ids.astype("<i4").tobytes())
        found = np.frombuffer(answer.log_probs, "<f4")
        dtypes = {shape.dtype for shape in self._schema.values()} & CANARY_TOLERANCE.keys()
        tolerance = max(CANARY_TOLERANCE[dtype] for dtype in dtypes)
        gap = float(np.abs(found - expected).max())
        if not gap <= tolerance:
            raise InternalError(
                f"{describe_replica(index, replica)} serves the right bits and computes other "
                f"log-probs: the canary is {gap:.3g} nats off, and rounding makes at most "
                f"{tolerance:g}; restart the replica, and check its engine.",
                reason=CANARY_MISMATCH,
                metadata={"gap": f"{gap:.6g}"},
            )


def words_of(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> Callable[[str], Shard]:
    """A tensor's bits in the served data type; a cast lasts while the tensor is looked at."""

    return lambda name: Shard(tensor_words(_cast(tensors[name], dtype)))


def served_schema(
    tensors: Mapping[str, torch.Tensor], wanted: str
) -> tuple[dict[str, TensorShape], torch.dtype | None]:
    """Schema and data type of the trainer's tensors as the replicas serve them.

    Raises PreconditionFailed when no data type fits.
    """
    for dtype in CASTS:
        # On the meta device a cast costs nothing, and the schema is names, shapes and types alone.
        cast = {name: _cast(tensor.to("meta"), dtype) for name, tensor in tensors.items()}
        if schema_digest(cast) == wanted:
            return {
                name: TensorShape(tuple(its.shape), DTYPE_NAMES[its.dtype])
                for name, its in cast.items()
            }, dtype
    raise PreconditionFailed(
        "the policy service's model has other tensors than the trainer's; serve the checkpoint "
        "that the trainer starts from.",
        reason="SCHEMA_MISMATCH",
    )


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _settings(config: PublishConfig) -> FleetSettings:
    return FleetSettings(
        quorum=config.quorum,
        in_flight=IN_FLIGHT[config.in_flight],
        prepare_timeout_s=config.prepare_timeout_s,
        commit_timeout_s=config.commit_timeout_s,
        flat_replicas=config.flat_replicas,
        peer_fan_out=config.peer_fan_out,
    )
