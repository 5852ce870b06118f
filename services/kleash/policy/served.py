"""What a replica serves and what its trainers have asked for; kleash.policy.replica changes it."""

from __future__ import annotations

from dataclasses import dataclass

from kleash.base import metrics
from kleash.policy.precedence import check_fence, check_newer, precedence
from kleash.weights.v1 import weights_pb2


@dataclass(eq=False)
class Served:
    """The served version. Guarded by the lock of its replica."""

    digest: str
    """Of the weights in memory."""
    awaits_publisher: bool
    """Not ready before a publisher said which version to serve."""
    key: weights_pb2.VersionKey | None = None
    """None for the weights that were loaded at the start."""
    fence: int = 0
    """Highest that was seen."""
    required: tuple[int, int] = (0, 0)
    """Fence and version that the replica must serve to be ready."""
    is_committing: bool = False
    is_quarantined: bool = False

    @property
    def version(self) -> int:
        """0 for the weights that were loaded at the start."""
        return self.key.version if self.key else 0

    def serves(self, key: weights_pb2.VersionKey) -> bool:
        """Whether exactly this version is served."""
        return self.key == key and not self.is_quarantined

    def is_ready(self) -> bool:
        """Whether the weights are those that the publisher requires, or newer ones."""
        served = precedence(self.key) if self.key else (0, 0)
        return not self.awaits_publisher and not self.is_quarantined and served >= self.required

    def replace(self, key: weights_pb2.VersionKey | None, digest: str) -> str:
        """Other weights are in memory now; returns the digest of those before."""
        old, self.key, self.digest = self.digest, key, digest
        return old

    def check_newer(self, key: weights_pb2.VersionKey) -> None:
        """Raise PreconditionFailed for a version that may not take the place of the served one."""
        if self.key is not None and not self.is_quarantined:
            check_newer(key, self.key)

    def hear_publisher(self, key: weights_pb2.VersionKey) -> None:
        """It says which version must be served; an older trainer's word changes nothing."""
        self.awaits_publisher = False
        if key.fence >= self.fence:
            self.fence = key.fence
            self.require(key.fence, key.version)

    def take_fence(self, key: weights_pb2.VersionKey) -> None:
        """A trainer speaks. Raises PermissionDenied (STALE_FENCE) for one that was replaced."""
        check_fence(key, self.fence)
        self.fence = key.fence

    def require(self, fence: int, version: int) -> None:
        """The replica is ready when it serves this version."""
        self.required = (fence, version)
        metrics.POLICY_REQUIRED_VERSION.set(version)

    def describe(
        self, schema_digest: str, state: weights_pb2.ReplicaState
    ) -> weights_pb2.GetWeightsResponse:
        """For whoever asks."""
        fence, required = self.required
        return weights_pb2.GetWeightsResponse(
            run_id=self.key.run_id if self.key else "",
            fence=self.fence,
            version=self.version,
            digest=self.digest,
            schema_digest=schema_digest,
            state=state,
            required_version=required if fence >= (self.key.fence if self.key else 0) else 0,
            served=self.key,
        )
