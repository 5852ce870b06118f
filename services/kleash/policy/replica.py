"""A replica's weights: which version it serves, and how it comes to serve another.

                 Prepare: fetch, check, predict the digest, save what will be overwritten
      SERVING ──────────────────► PREPARING ──────────────────► STAGED
        ▲  ▲                          │ any failure               │ Commit, between two steps
        │  └──────────────────────────┴───────── Abort ◄──────────┤
        │  digest as promised: the new version, else the old one  ▼
        └──────────────────────────────────────────────────── COMMITTING
                                                                  │ old weights cannot be restored
        an anchor is applied ◄──────────────────────────────── QUARANTINED: refuses to generate

Old weights serve until the commit, and after every failure. Calls name a version by its key and may
be repeated. A greater fence takes the place of whatever an older trainer has under way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from kleash.base import metrics, tracing
from kleash.policy.commits import Committed, InFlight
from kleash.policy.decode_loop import DecodeLoop
from kleash.policy.live import LiveWeights, UndoFailedError
from kleash.policy.precedence import busy, precedence, superseded
from kleash.policy.requests import quarantined
from kleash.policy.served import Served
from kleash.policy.staging import OnProgress, Staged, stage
from kleash.rpc.errors import (
    InternalError,
    PreconditionFailed,
    ServiceError,
)
from kleash.weights.fetch import Source
from kleash.weights.manifest import describe_key
from kleash.weights.spool import Spool
from kleash.weights.v1 import weights_pb2

logger = logging.getLogger(__name__)

X = TypeVar("X")

SERVING = weights_pb2.REPLICA_STATE_SERVING
PREPARING = weights_pb2.REPLICA_STATE_PREPARING
STAGED = weights_pb2.REPLICA_STATE_STAGED
COMMITTING = weights_pb2.REPLICA_STATE_COMMITTING
QUARANTINED = weights_pb2.REPLICA_STATE_QUARANTINED


@dataclass(eq=False)
class _Preparation:
    """A version on its way in."""

    key: weights_pb2.VersionKey
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    outcome: Future[Staged] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class _Before:
    """The version before the served one."""

    key: weights_pb2.VersionKey | None
    digest: str
    staged: Staged


class WeightsReplica:
    """Guards one model's weights. Every method may be called from any thread."""

    def __init__(
        self,
        model: Any,
        loop: DecodeLoop,
        spool: Spool,
        *,
        on_served: Callable[[str, str], None],
        awaits_publisher: bool = False,
    ) -> None:
        """Args:
        on_served: called with the old and the new digest after a version was put in place.
        awaits_publisher: not ready before a publisher said which version to serve.
        """
        self._on_served = on_served
        self._loop = loop
        self._live = LiveWeights(model)
        self.spool = spool
        self._lock = threading.Lock()
        self._served = Served(self._live.digest, awaits_publisher)
        self._preparation: _Preparation | None = None
        self._staged: Staged | None = None
        self._before: _Before | None = None

    # ------------------------------------------------------------------------------------- state

    def get_weights(self) -> weights_pb2.GetWeightsResponse:
        """What is served now."""
        with self._lock:
            return self._served.describe(self._live.schema_digest, self._state())

    def audit(self) -> None:
        """Compute the digest of all weights again. Raises InternalError when it is another."""
        # Both in the decoding thread, where no commit can come between them.
        found, served = self._loop.run(lambda: (self._live.audit(), self._served.digest)).result()
        if found != served:
            raise InternalError(
                f"the weights in memory have digest {found}, and {served} is served; "
                "restart this replica.",
                reason="DIGEST_MISMATCH",
            )

    def is_ready(self) -> bool:
        """Whether the weights are those that the publisher requires, or newer ones."""
        with self._lock:
            return self._served.is_ready()

    def serves(self, key: weights_pb2.VersionKey) -> bool:
        """Whether exactly this version is served."""
        with self._lock:
            return self._served.serves(key)

    def require(self, key: weights_pb2.VersionKey | None) -> None:
        """A publisher names the version that a replica must serve; None before its first one."""
        with self._lock:
            if key is not None:
                self._served.hear_publisher(key)

    # ----------------------------------------------------------------------------------- prepare

    def prepare(
        self,
        request: weights_pb2.PrepareRequest,
        sources: Sequence[Source],
        on_progress: OnProgress = lambda _done, _total: None,
    ) -> weights_pb2.PrepareResponse:
        """Fetch and check a version while the old one serves. Blocks.

        Raises PermissionDenied (STALE_FENCE), PreconditionFailed (VERSION_CONFLICT,
        VERSION_NOT_NEWER, SCHEMA_MISMATCH, DIGEST_MISMATCH, NON_FINITE), Overloaded (SPOOL_FULL,
        PUBLISH_IN_PROGRESS), Unavailable when no source has the bytes, Cancelled when a newer
        preparation took its place.
        """
        key = request.key
        with self._lock:
            self._served.take_fence(key)
            if request.required_version:
                self._served.require(key.fence, request.required_version)
            if self._served.serves(key):
                return weights_pb2.PrepareResponse(state=SERVING)
            self._served.check_newer(key)
            if self._staged is not None and self._staged.key == key:
                return _is_staged(self._staged)
            running = self._preparation
            is_first = running is None or running.key != key
            if is_first:
                self._give_way(key)
                running = self._preparation = _Preparation(key)
        assert running is not None
        if is_first:
            self._run(running, request, sources, on_progress)
        return _is_staged(running.outcome.result())

    def _run(
        self,
        preparation: _Preparation,
        request: weights_pb2.PrepareRequest,
        sources: Sequence[Source],
        on_progress: OnProgress,
    ) -> None:
        try:
            staged = stage(
                self._live,
                self.spool,
                request,
                sources,
                have="" if self._served.is_quarantined else self._served.digest,
                keep=self._before.staged.object_ids if self._before else set(),
                on_progress=on_progress,
                is_cancelled=preparation.is_cancelled.is_set,
            )
            with self._lock:
                if preparation.is_cancelled.is_set():
                    staged.close_saved()
                    raise superseded(preparation.key)
                self._staged, self._preparation = staged, None
        except BaseException as error:
            with self._lock:
                if self._preparation is preparation:
                    self._preparation = None
            metrics.WEIGHTS_UPDATE_FAILURES.inc()
            preparation.outcome.set_exception(error)
        else:
            preparation.outcome.set_result(staged)

    # ------------------------------------------------------------------------------------ commit

    def begin_commit(
        self, key: weights_pb2.VersionKey, mode: InFlight = "keep", timeout_s: float | None = None
    ) -> Future[Committed[int]] | None:
        """Have a staged version put in place; None when it is served already.

        The future raises PreconditionFailed (DIGEST_MISMATCH) when the version was undone,
        DeadlineExceeded when a drain took too long. Raises PreconditionFailed (NOT_STAGED).
        """
        with self._lock:
            self._served.take_fence(key)
            if self._served.serves(key):
                return None
            staged = self._staged
            if staged is None or staged.key != key:
                raise PreconditionFailed(
                    f"{describe_key(key)} is not staged here; prepare it first.",
                    reason="NOT_STAGED",
                )
            if staged.commit is None or staged.commit.done():
                staged.commit = self._loop.commit(
                    tracing.bound(partial(self._apply, staged)), mode, timeout_s=timeout_s
                )
            return staged.commit

    def commit_response(
        self, key: weights_pb2.VersionKey, committed: Committed[int] | None
    ) -> weights_pb2.CommitResponse:
        """What a caller is told of a commit; ``committed`` is None when nothing was applied."""
        return weights_pb2.CommitResponse(
            version=key.version,
            digest=self._served.digest,
            already_committed=committed is None,
            pause_ns=committed.pause_ns if committed else 0,
            fetched_bytes=committed.result if committed else 0,
        )

    def _apply(self, staged: Staged) -> int:
        """In the decoding thread: the whole version or nothing. Returns the bytes it took."""
        with self._lock:
            if self._staged is not staged:
                raise superseded(staged.key)
            self._served.is_committing = True
        try:
            self._live.apply(staged.steps, staged.saved, staged.key.digest)
        except UndoFailedError as error:
            self._quarantine(error)
        except ServiceError:
            self._forget(staged)
            metrics.WEIGHTS_UPDATE_FAILURES.inc()
            raise
        finally:
            self._served.is_committing = False
        is_anchor = bool(staged.steps) and not staged.steps[0].manifest.base_digest
        with self._lock:
            old, self._before = self._before, _Before(self._served.key, self._served.digest, staged)
            old_digest = self._served.replace(staged.key, staged.key.digest)
            self._staged = None
            was_quarantined = self._served.is_quarantined
            self._served.is_quarantined = was_quarantined and not is_anchor
        self._show(old_digest)
        if was_quarantined and is_anchor:
            self._loop.refuse(None)
            metrics.POLICY_QUARANTINED.set(0)
        if old is not None:
            old.staged.close_saved()
        self.spool.keep_only(staged.object_ids)
        metrics.WEIGHTS_UPDATE_BYTES.inc(staged.fetched_bytes)
        metrics.WEIGHTS_UPDATE_SECONDS.observe(time.monotonic() - staged.began)
        return staged.fetched_bytes

    def abort(self, key: weights_pb2.VersionKey) -> weights_pb2.AbortResponse:
        """Forget a version that is on its way in or staged; one that is served stays."""
        with self._lock:
            self._served.take_fence(key)
            if self._preparation is not None and self._preparation.key == key:
                self._preparation.is_cancelled.set()
            staged = self._staged if self._staged and self._staged.key == key else None
        if staged is not None and (staged.commit is None or staged.commit.cancel()):
            self._forget(staged)
        return weights_pb2.AbortResponse(version=self.get_weights().version)

    def begin_rollback(self, key: weights_pb2.VersionKey) -> Future[Committed[None]]:
        """Have the served version, which must be ``key``, taken back.

        Raises PreconditionFailed: NOT_SERVED, or NO_VERSION_BEFORE.
        """
        with self._lock:
            self._served.take_fence(key)
            staged = self._staged
            is_under_way = staged is not None and staged.key == key and staged.commit is not None
            if not is_under_way:  # else it is asked again behind the commit
                self._check_rollback(key)
        return self._loop.commit(partial(self._take_back, key), "keep")

    def _check_rollback(self, key: weights_pb2.VersionKey) -> _Before:
        if not self._served.serves(key):
            raise PreconditionFailed(
                f"{describe_key(key)} is not the served one, which is "
                f"{self._served.version}; there is nothing to take back.",
                reason="NOT_SERVED",
            )
        if self._before is None:
            raise PreconditionFailed(
                f"the version before {key.version} is not kept here any more; only one is.",
                reason="NO_VERSION_BEFORE",
            )
        return self._before

    def _take_back(self, key: weights_pb2.VersionKey) -> None:
        """In the decoding thread."""
        with self._lock:
            before = self._check_rollback(key)
        try:
            self._live.undo(before.staged.steps, before.staged.saved, before.digest)
        except UndoFailedError as error:
            self._quarantine(error)
        with self._lock:
            old_digest = self._served.replace(before.key, before.digest)
            self._before = None
            # What was prepared is a change of the weights that were taken back.
            if self._preparation is not None:
                self._preparation.is_cancelled.set()
            staged, self._staged = self._staged, None
        self._show(old_digest)
        before.staged.close_saved()
        if staged is not None:
            if staged.commit is not None:
                staged.commit.cancel()
            staged.close_saved()

    # ------------------------------------------------------------------------------------- helpers

    def _state(self) -> weights_pb2.ReplicaState:
        if self._served.is_quarantined:
            return QUARANTINED
        if self._served.is_committing:
            return COMMITTING
        if self._staged is not None:
            return STAGED
        return SERVING if self._preparation is None else PREPARING

    def _give_way(self, key: weights_pb2.VersionKey) -> None:
        """Whatever else is on its way makes room for ``key``, or ``key`` is told to wait."""
        running, staged = self._preparation, self._staged
        if running is not None:
            if precedence(key) <= precedence(running.key):
                raise busy(running.key, "being prepared")
            running.is_cancelled.set()
        if staged is None:
            return
        if precedence(key) < precedence(staged.key):
            raise busy(staged.key, "staged and newer")
        if staged.commit is not None and not staged.commit.cancel() and not staged.commit.done():
            raise busy(staged.key, "being committed")
        self._staged = None
        staged.close_saved()

    def _forget(self, staged: Staged) -> None:
        with self._lock:
            if self._staged is staged:
                self._staged = None
        staged.close(self.spool)

    def _quarantine(self, error: UndoFailedError) -> None:
        with self._lock:
            kept = [self._staged, self._before.staged if self._before else None]
            self._served.is_quarantined, self._before, self._staged = True, None, None
        for staged in kept:
            if staged is not None:
                staged.close_saved()
        self._loop.refuse(quarantined)
        metrics.POLICY_QUARANTINED.set(1)
        metrics.WEIGHTS_UPDATE_FAILURES.inc()
        logger.error("quarantined: %s", error)
        raise InternalError(
            f"{error} This replica refuses to generate until it gets all weights again.",
            reason="QUARANTINED",
        ) from error

    def _show(self, old_digest: str) -> None:
        version = self._served.version
        self._loop.decoder.weights_version = version
        self._on_served(old_digest, self._served.digest)
        metrics.POLICY_WEIGHTS_VERSION.set(version)


def wait_for_commit(commit: Future[Committed[X]], key: weights_pb2.VersionKey) -> Committed[X]:
    """The outcome of a commit. Raises what it raised, Cancelled when it gave way."""
    try:
        return commit.result()
    except CancelledError:
        raise superseded(key) from None


def _is_staged(staged: Staged) -> weights_pb2.PrepareResponse:
    return weights_pb2.PrepareResponse(
        state=STAGED, fetched_bytes=staged.fetched_bytes, total_bytes=staged.fetched_bytes
    )
