"""Two-phase commit of a version over all replicas, on the trainer's side.

    stored ─► prepare all, in parallel ─► enough staged? ─no─► abort all ───────────► given up
                                              │ yes: written down before anyone is told
                                          commit all ─► enough committed? ─no─► roll back ► given up
                                              │ yes
                                          the head; replicas that are missing catch up

"Enough" is every replica, or the configured quorum. Replicas may come and go between two publishes;
each has a number that stays its own. Beyond ``flat_replicas`` a replica fetches from
one that fetches before it, a tree; the publisher stays its second source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from kleash.base import tracing
from kleash.rpc.errors import InternalError, ServiceError, Unavailable
from kleash.weights.fetch import Source
from kleash.weights.manifest import describe_key, key_of
from kleash.weights.store import Store
from kleash.weights.v1 import weights_pb2

logger = logging.getLogger(__name__)

X = TypeVar("X")


class Replica(Protocol):
    """WeightsClient, or a replica in this process."""

    @property
    def address(self) -> str: ...

    def get_weights(self) -> weights_pb2.GetWeightsResponse: ...

    def prepare(
        self, request: weights_pb2.PrepareRequest, store: Source, *, timeout_s: float | None = None
    ) -> weights_pb2.PrepareResponse: ...

    def commit(
        self,
        key: weights_pb2.VersionKey,
        in_flight: weights_pb2.InFlight,
        *,
        timeout_s: float | None = None,
    ) -> weights_pb2.CommitResponse: ...

    def abort(self, key: weights_pb2.VersionKey) -> weights_pb2.AbortResponse: ...

    def rollback(self, key: weights_pb2.VersionKey) -> weights_pb2.RollbackResponse: ...

    def check_canary(self, token_ids: bytes) -> weights_pb2.CheckCanaryResponse: ...


Replicas = Mapping[int, Replica]
"""Replicas by their numbers. One that changes while it is used gives snapshots: dict(replicas)."""

Check = Callable[[int, Replica], None]
"""Looks at a replica, by its number, that has committed; what it raises is a failed commit."""

CANARY_MISMATCH = "CANARY_MISMATCH"
"""Reason of a check that no quorum outvotes: the version is right, and is computed wrongly."""


@dataclass(frozen=True)
class FleetSettings:
    """How a version is brought to the replicas."""

    quorum: int | None = None
    """Replicas that must commit; None means all."""
    in_flight: weights_pb2.InFlight = weights_pb2.IN_FLIGHT_KEEP
    prepare_timeout_s: float = 600.0
    commit_timeout_s: float = 120.0
    flat_replicas: int = 8
    """Replicas that fetch from the publisher itself; the others fetch from replicas."""
    peer_fan_out: int = 3
    """Replicas that fetch from one replica."""


@dataclass(frozen=True)
class FleetReport:
    """What became of a version at every replica, by their numbers."""

    committed: dict[int, weights_pb2.CommitResponse]
    failures: dict[int, ServiceError] = field(default_factory=dict)


class Coordinator:
    """Commits versions of one store over a fleet: one publish at a time, catch_up from any."""

    def __init__(
        self,
        replicas: Replicas,
        store: Store,
        store_address: str,
        settings: FleetSettings | None = None,
        may_publish: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        store_address: where replicas in other processes reach the store.
        may_publish: raises a ServiceError when another trainer may hold the fleet; asked again
            before anything is committed, as a preparation may take minutes.
        """
        self.replicas = replicas
        self.settings = settings or FleetSettings()
        self._store = store
        self._store_address = store_address
        self._may_publish = may_publish

    def needed(self, num_replicas: int) -> int:
        """Replicas that must commit, of so many. Raises Unavailable when there are fewer."""
        needed = self.settings.quorum or max(num_replicas, 1)
        if num_replicas < needed:
            raise Unavailable(
                f"{num_replicas} policy replicas are there, and a version needs {needed}; start "
                "them, or lower publish.quorum.",
                reason="NO_REPLICA",
            )
        return needed

    def publish(
        self,
        manifest: weights_pb2.Manifest,
        check: Check = lambda _index, _replica: None,
    ) -> FleetReport:
        """Make a stored version the served one at all replicas, or at none.

        Raises the first replica's ServiceError when too few replicas follow.
        """
        key, store = key_of(manifest), self._store
        request, fleet = self._request(key, manifest), dict(self.replicas)
        needed = self.needed(len(fleet))
        staged, failures = self._each(fleet, lambda index: self._prepare(fleet, index, request))
        if len(staged) < needed:
            self._each(fleet, lambda index: fleet[index].abort(key))
            store.record("given_up", key, phase="prepare")
            raise _first(failures)
        try:
            self._may_publish()
        except ServiceError:
            self._each(fleet, lambda index: fleet[index].abort(key))
            store.record("given_up", key, phase="prepare")
            raise
        store.record("deciding", key, replicas=sorted(staged))
        committed, late = self._each(
            sorted(staged), lambda index: self._commit(index, fleet[index], key, check)
        )
        failures |= late
        is_off = any(error.reason == CANARY_MISMATCH for error in late.values())
        if len(committed) < needed or is_off:
            for index in staged:
                self._take_back(index, fleet[index], key)
            store.record("given_up", key, phase="commit")
            raise _first(late)
        for index, error in failures.items():
            logger.warning(
                "%s does not serve %s yet and has to catch up: %s",
                describe_replica(index, fleet[index]),
                describe_key(key),
                error,
            )
        store.commit(key)
        return FleetReport(committed, failures)

    def catch_up(
        self, index: int, key: weights_pb2.VersionKey, check: Check
    ) -> weights_pb2.CommitResponse:
        """Bring one replica to a committed version, whatever it serves. Raises ServiceError."""
        fleet = dict(self.replicas)
        if index not in fleet:
            raise Unavailable(f"policy replica {index} has left.", reason="NO_REPLICA")
        self._prepare(fleet, index, self._request(key, None))
        self._may_publish()
        return self._commit(index, fleet[index], key, check)

    def sources(self, fleet: Replicas, index: int) -> list[str]:
        """Addresses of the stores from which a replica fetches, in order."""
        flat, order = self.settings.flat_replicas, sorted(fleet)
        place = order.index(index)
        if place < flat:
            return [self._store_address]
        parent = order[(place - flat) // self.settings.peer_fan_out]
        return [fleet[parent].address, self._store_address]

    def _request(
        self, key: weights_pb2.VersionKey, manifest: weights_pb2.Manifest | None
    ) -> weights_pb2.PrepareRequest:
        head = self._store.head
        is_same_run = head is not None and head.fence == key.fence
        return weights_pb2.PrepareRequest(
            key=key, manifest=manifest, required_version=head.version if head and is_same_run else 0
        )

    def _prepare(
        self, fleet: Replicas, index: int, request: weights_pb2.PrepareRequest
    ) -> weights_pb2.PrepareResponse:
        own = weights_pb2.PrepareRequest()
        own.CopyFrom(request)
        own.sources.extend(self.sources(fleet, index))
        with tracing.span("send", replica=index):
            return fleet[index].prepare(own, self._store, timeout_s=self.settings.prepare_timeout_s)

    def _commit(
        self, index: int, replica: Replica, key: weights_pb2.VersionKey, check: Check
    ) -> weights_pb2.CommitResponse:
        with tracing.span("commit", replica=index):
            response = replica.commit(
                key, self.settings.in_flight, timeout_s=self.settings.commit_timeout_s
            )
        if (response.version, response.digest) != (key.version, key.digest):
            raise InternalError(
                f"{describe_replica(index, replica)} serves version {response.version} with digest "
                f"{response.digest} after the commit of version {key.version} with digest "
                f"{key.digest}; does another trainer publish to it?"
            )
        check(index, replica)
        return response

    def _take_back(self, index: int, replica: Replica, key: weights_pb2.VersionKey) -> None:
        """Best effort: a replica that cannot be told is brought along by the next publish."""
        for undo in (replica.abort, replica.rollback):
            try:
                undo(key)
            except ServiceError as error:
                if error.reason != "NOT_SERVED":
                    logger.warning("%s: %s", describe_replica(index, replica), error)

    def _each(
        self, numbers: Iterable[int], function: Callable[[int], X]
    ) -> tuple[dict[int, X], dict[int, ServiceError]]:
        """``function`` of every number, in parallel: results and failures."""
        results: dict[int, X] = {}
        failures: dict[int, ServiceError] = {}
        indices = list(numbers)
        with ThreadPoolExecutor(max(len(indices), 1), "publish") as threads:
            run = tracing.bound(function)
            futures = {index: threads.submit(run, index) for index in indices}
            for index, future in futures.items():
                try:
                    results[index] = future.result()
                except ServiceError as error:
                    failures[index] = error
        return results, failures


def describe_replica(index: int, replica: Replica) -> str:
    """For messages: its number, and its address when it has one."""
    return f"policy replica {index}" + (f" ({replica.address})" if replica.address else "")


def _first(failures: dict[int, ServiceError]) -> ServiceError:
    """The failure to tell: one that trying again will not cure, if there is one."""
    return min(
        failures.values(),
        key=lambda error: error.code.name in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"),
    )
