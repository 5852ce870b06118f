"""Which version takes precedence over which, and what the other's caller is told."""

from __future__ import annotations

from kleash.rpc.errors import Cancelled, Overloaded, PermissionDenied, PreconditionFailed
from kleash.weights.manifest import describe_key
from kleash.weights.v1 import weights_pb2

BUSY_RETRY_S = 1.0


def precedence(key: weights_pb2.VersionKey) -> tuple[int, int]:
    """Compares versions: a newer trainer's before any of an older one, then the newer version."""
    return key.fence, key.version


def check_fence(key: weights_pb2.VersionKey, seen: int) -> None:
    """Raise PermissionDenied (STALE_FENCE) for a trainer older than one that was seen."""
    if key.fence < seen:
        raise PermissionDenied(
            f"fence {key.fence} of run '{key.run_id}' is lower than {seen}, which this "
            "replica has seen: another trainer has taken over; stop this one.",
            reason="STALE_FENCE",
            metadata={"fence": str(key.fence), "seen": str(seen)},
        )


def check_newer(key: weights_pb2.VersionKey, served: weights_pb2.VersionKey) -> None:
    """Raise PreconditionFailed unless a version is newer than the served one, or its trainer is."""
    if key.fence > served.fence:
        return
    seen = {"version": str(key.version), "served": str(served.version)}
    if key.version == served.version:
        raise PreconditionFailed(
            f"version {key.version} is served already with digest {served.digest} of run "
            f"'{served.run_id}' and not {key.digest}; publish a new version.",
            reason="VERSION_CONFLICT",
            metadata=seen,
        )
    if key.version < served.version:
        raise PreconditionFailed(
            f"version {key.version} is older than {served.version}, which is served; "
            "publish a newer version or take a greater fence.",
            reason="VERSION_NOT_NEWER",
            metadata=seen,
        )


def busy(other: weights_pb2.VersionKey, doing: str) -> Overloaded:
    """Of a call that has to wait for another version."""
    return Overloaded(
        f"{describe_key(other)} is {doing}; try again when that is over.",
        reason="PUBLISH_IN_PROGRESS",
        retry_after_s=BUSY_RETRY_S,
    )


def superseded(key: weights_pb2.VersionKey) -> Cancelled:
    """Of a call whose version has given way."""
    return Cancelled(
        f"the preparation of {describe_key(key)} was given up: it was aborted, or a newer one took "
        "its place.",
        reason="SUPERSEDED",
    )
