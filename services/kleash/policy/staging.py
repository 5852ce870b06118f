"""Bringing a version to the point of its commit: plan, fetch, check, predict, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from kleash.base import tracing
from kleash.policy.commits import Committed
from kleash.policy.live import LiveWeights, Step
from kleash.rpc.errors import PreconditionFailed, Unavailable
from kleash.weights.fetch import Source, fetch_object
from kleash.weights.manifest import check_manifest, describe_key, encoded_bytes
from kleash.weights.spool import Spool, SpoolObject
from kleash.weights.v1 import weights_pb2

OnProgress = Callable[[int, int], None]
"""Called with the bytes fetched so far and in all."""


@dataclass(eq=False)
class Staged:
    """A version that was fetched and checked, and after its commit what takes it back."""

    key: weights_pb2.VersionKey
    steps: list[Step]
    saved: SpoolObject | None
    """Words that full parts overwrite."""
    fetched_bytes: int
    began: float
    commit: Future[Committed[int]] | None = None
    """Its commit, once asked for."""

    @property
    def object_ids(self) -> set[bytes]:
        """Objects of its steps."""
        return {step.manifest.manifest_hash for step in self.steps}

    def close_saved(self) -> None:
        """The version is not taken back any more."""
        if self.saved is not None:
            self.saved.close()

    def close(self, spool: Spool) -> None:
        """Nothing of it is kept."""
        self.close_saved()
        for step in self.steps:
            spool.drop(step.manifest.manifest_hash)


def stage(
    live: LiveWeights,
    spool: Spool,
    request: weights_pb2.PrepareRequest,
    sources: Sequence[Source],
    *,
    have: str,
    keep: set[bytes],
    on_progress: OnProgress,
    is_cancelled: Callable[[], bool],
) -> Staged:
    """Everything of a commit that does not touch the live weights.

    ``have`` is their digest, empty when they are of no version; ``keep`` are the objects that may
    be needed to go back. Raises what ``WeightsReplica.prepare`` names.
    """
    began = time.monotonic()
    manifests = _plan(live, request, sources, have)
    # What was fetched for a version that was given up makes room.
    spool.keep_only(keep | {manifest.manifest_hash for manifest in manifests})
    total, done = sum(map(encoded_bytes, manifests)), 0

    def progress(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        on_progress(done, total)

    steps = []
    for manifest in manifests:
        check_manifest(manifest, live.schema, live.schema_digest)
        target = spool.create(manifest.manifest_hash, encoded_bytes(manifest))
        with tracing.span("receive", bytes=encoded_bytes(manifest)):
            fetch_object(
                manifest.manifest_hash,
                target,
                sources,
                on_progress=progress,
                is_cancelled=is_cancelled,
            )
        steps.append(Step(manifest, target.view()))
    try:
        with tracing.span("stage", weights_version=request.key.version):
            if steps:
                live.predict(steps)
            saved = live.save(steps, spool)
    except PreconditionFailed:
        for manifest in manifests:  # bytes that are wrong must not be kept for the next attempt
            spool.drop(manifest.manifest_hash)
        raise
    return Staged(request.key, steps, saved, done, began)


def _plan(
    live: LiveWeights, request: weights_pb2.PrepareRequest, sources: Sequence[Source], have: str
) -> list[weights_pb2.Manifest]:
    """The manifests that lead from the served weights to the wanted ones."""
    has_manifest = request.HasField("manifest")
    last = [request.manifest] if has_manifest else []
    want = request.manifest.base_digest if has_manifest else request.key.digest
    manifests = last
    if want not in ("", have):
        if not sources:
            raise Unavailable(
                f"{describe_key(request.key)} is a change of other weights than those served here, "
                "and no source was named that could plan a way; name one.",
                reason="NO_SOURCE",
            )
        plan = sources[-1].plan_update(have, live.schema_digest, want)
        manifests = [*plan.manifests, *last]
    at = have
    for manifest in manifests:
        if manifest.base_digest not in ("", at):
            raise PreconditionFailed(
                f"version {manifest.version} is a change of the weights {manifest.base_digest} "
                f"and not of {at}; publish again.",
                reason="WRONG_BASE",
                metadata={"have": at, "base": manifest.base_digest},
            )
        at = manifest.result_digest
    if at != request.key.digest:
        raise PreconditionFailed(
            f"the plan leads to the weights {at} and not to {request.key.digest}; try again.",
            reason="WRONG_BASE",
            metadata={"have": at, "want": request.key.digest},
        )
    return manifests
