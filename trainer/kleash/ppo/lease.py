"""The right to publish to a fleet of policy replicas, which one trainer has at a time.

The fence that travels with every version makes replicas refuse an older trainer; a lease keeps a
second trainer from starting while the first one lives. kleash.cluster.lease is one of Kubernetes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from kleash.ppo.config import PPOConfig


class PublishLease(Protocol):
    """Held from before the services are asked until the run is over."""

    @property
    def fence(self) -> int:
        """Highest fence that a holder has recorded; 0 for none."""
        ...

    def record(self, run_id: str, fence: int) -> None:
        """The holder's run and fence, for those who come after it. Raises ServiceError."""
        ...

    def check(self) -> None:
        """Raise Unavailable while it is not known who holds it, PermissionDenied when another."""
        ...


class NoLease:
    """Whoever starts last publishes: the fence alone decides."""

    fence = 0

    def record(self, run_id: str, fence: int) -> None:
        """There is nobody to tell."""

    def check(self) -> None:
        """Nobody else can hold what does not exist."""


HoldLease = Callable[
    [PPOConfig, Callable[[], bool]], contextlib.AbstractContextManager[PublishLease]
]
"""Waits for the lease of a configuration until the function says that nobody wants it any more."""


@contextlib.contextmanager
def no_lease(_config: PPOConfig, _is_abandoned: Callable[[], bool]) -> Iterator[PublishLease]:
    """For trainers outside of a cluster."""
    yield NoLease()
