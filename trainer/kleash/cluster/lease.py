"""A Lease of Kubernetes as the right to publish to a fleet: one trainer at a time.

    free, expired, or held by this very pod ──► taken
    held by a trainer of the same run       ──► waited for: it is on its way out
    held by a trainer of another run        ──► refused, once that one was seen to be alive

``kubernetes.leaderelection`` waits for whatever is held, never gives a lease back, and keeps no
fence; so the few calls are made here. Time is measured as client-go does, on the own clock, from
the moment at which a renewal was first seen.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from kleash.base.errors import ConfigError
from kleash.cluster.api import open_api, own_namespace, this_pod
from kleash.cluster.stages import RUN_LABEL
from kleash.ppo.config import PPOConfig
from kleash.ppo.lease import PublishLease
from kleash.rpc.errors import PermissionDenied, Unavailable

logger = logging.getLogger(__name__)

DURATION_S = 15
"""Without a renewal for so long a lease is free."""
RENEW_S = 4.0
POLL_S = 1.0
MARGIN_S = 2.0
"""A holder stops publishing this long before others may take the lease."""

FENCE = "kleash.dev/fence"


class FleetLease:
    """Implements PublishLease; ``acquire`` it, and ``release`` it in any case."""

    def __init__(self, api: Any, namespace: str, name: str, *, run: str, holder: str) -> None:
        """Args:
        run: trainers of the same run wait for each other.
        holder: this trainer's pod.
        """
        import kubernetes

        self._models: Any = kubernetes.client
        self._api = kubernetes.client.CoordinationV1Api(api)
        self._namespace, self._name = namespace, name
        self._run = run
        self._identity = f"{run}/{holder}"
        self._lock = threading.Lock()
        self._lease: Any = None
        self._renewed = 0.0
        self._lost_to = ""
        self._problem = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="kleash-lease", daemon=True)

    # --------------------------------------------------------------------------- for the trainer

    @property
    def fence(self) -> int:
        """Highest fence that a holder has recorded."""
        return int((self._lease.metadata.annotations or {}).get(FENCE, "0"))

    def record(self, run_id: str, fence: int) -> None:
        """Write run and fence on the lease. Raises Unavailable, PermissionDenied."""
        with self._lock:
            self.check()
            notes = {
                **(self._lease.metadata.annotations or {}),
                RUN_LABEL: run_id,
                FENCE: str(fence),
            }
            self._lease.metadata.annotations = notes
            self._renew()
            if self._problem:
                raise Unavailable(
                    f"the fence was not written on the lease {self._name} ({self._problem}); "
                    "nothing is published until it is.",
                    reason="LEASE_NOT_RENEWED",
                )
        self.check()

    def check(self) -> None:
        """Raise PermissionDenied when another trainer has it, Unavailable when that may be so."""
        if self._lost_to:
            raise PermissionDenied(
                f"the lease {self._name} is held by {self._lost_to} now; this trainer publishes no "
                "more. Its run goes on from its newest checkpoint when it is started again.",
                reason="LEASE_LOST",
            )
        age = time.monotonic() - self._renewed
        if age > DURATION_S - MARGIN_S:
            raise Unavailable(
                f"the lease {self._name} was last renewed {age:.0f} s ago ({self._problem}); "
                "nothing is published until it is this trainer's again.",
                reason="LEASE_NOT_RENEWED",
            )

    # --------------------------------------------------------------------- taking, keeping, giving

    def acquire(self, wait_s: float, is_abandoned: Callable[[], bool]) -> None:
        """Wait until it is this trainer's.

        Raises ConfigError when a living trainer of another run holds it or the rights are missing,
        Unavailable when the API or a trainer of the same run is in the way for ``wait_s``.
        """
        deadline = time.monotonic() + wait_s
        seen, since, told = None, 0.0, ""
        while True:
            problem = ""
            try:
                lease = self._read()
                holder = lease.spec.holder_identity or ""
                beat = (holder, lease.spec.renew_time)
                is_alive = seen is not None and seen != beat and seen[0] == holder
                if seen != beat:
                    seen, since = beat, time.monotonic()
                is_expired = time.monotonic() - since > (lease.spec.lease_duration_seconds or 0)
                if holder in ("", self._identity) or is_expired:
                    self._take(lease)
                    self._thread.start()
                    return
                if is_alive and holder.partition("/")[0] != self._run:
                    raise self._refusal(lease, holder)
                problem = f"it is held by {holder}"
            except self._models.ApiException as error:
                if error.status in (401, 403):
                    raise self._forbidden(error) from None
                if error.status != 409:  # somebody was faster: look again
                    problem = f"{error.status} {error.reason}"
            except _connection_errors() as error:
                problem = " ".join(str(error).split())[:200]
            if problem and problem != told:
                logger.info("waiting for the lease %s: %s", self._name, problem)
                told = problem
            if time.monotonic() > deadline or is_abandoned():
                raise Unavailable(
                    f"the lease {self._namespace}/{self._name} could not be had within "
                    f"{wait_s:g} s: {told or 'others took it each time'}; kubectl describe lease "
                    f"{self._name} -n {self._namespace} shows its holder and when it renewed: end "
                    "that trainer, or raise services.wait_s.",
                    reason="LEASE",
                )
            time.sleep(POLL_S)

    def release(self) -> None:
        """Give it back, so that nobody waits for it to expire."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            if self._lease is None or self._lost_to:
                return
            self._lease.spec.holder_identity = ""
            try:
                self._replace()
            except (self._models.ApiException, *_connection_errors()) as error:
                logger.info("the lease %s was not given back (%s)", self._name, error)

    def _read(self) -> Any:
        try:
            return self._api.read_namespaced_lease(
                self._name, self._namespace, _request_timeout=(5, 10)
            )
        except self._models.ApiException as error:
            if error.status != 404:
                raise
        return self._api.create_namespaced_lease(
            self._namespace,
            self._models.V1Lease(
                metadata=self._models.V1ObjectMeta(name=self._name),
                spec=self._models.V1LeaseSpec(
                    holder_identity="", lease_duration_seconds=DURATION_S, lease_transitions=0
                ),
            ),
            _request_timeout=(5, 10),
        )

    def _take(self, lease: Any) -> None:
        if lease.spec.holder_identity != self._identity:
            lease.spec.lease_transitions = (lease.spec.lease_transitions or 0) + 1
        lease.spec.holder_identity = self._identity
        lease.spec.lease_duration_seconds = DURATION_S
        lease.spec.acquire_time = _now()
        with self._lock:
            self._lease = lease
            self._replace()
        logger.info(
            "holding the lease %s as %s",
            self._name,
            self._identity,
            extra={"event": "LeaseAcquired"},
        )

    def _keep(self) -> None:
        # After a failure sooner: two attempts that hang must not use up the lease's time.
        while not self._stopping.wait(min(RENEW_S, 1.0) if self._problem else RENEW_S):
            with self._lock:
                self._renew()
            if self._lost_to:
                return

    def _renew(self) -> None:
        """Under the lock. A failure is remembered for ``check``, which decides what it means."""
        try:
            self._replace()
        except self._models.ApiException as error:
            self._problem = f"{error.status} {error.reason}"
            if error.status in (404, 409):
                self._look_again()
        except _connection_errors() as error:
            self._problem = " ".join(str(error).split())[:200]

    def _look_again(self) -> None:
        """Somebody wrote to it: another holder, or hands that changed something or deleted it."""
        with contextlib.suppress(self._models.ApiException, *_connection_errors()):
            lease = self._read()
            if lease.spec.holder_identity not in ("", None, self._identity):
                self._lost_to = lease.spec.holder_identity
                logger.error(
                    "the lease %s is held by %s now",
                    self._name,
                    self._lost_to,
                    extra={"event": "LeaseLost"},
                )
                return
            lease.metadata.annotations = {
                **(lease.metadata.annotations or {}),
                **(self._lease.metadata.annotations or {}),
            }
            # One without a holder was deleted, and made again by this look.
            lease.spec.holder_identity = self._identity
            self._lease = lease
            self._replace()

    def _replace(self) -> None:
        began = time.monotonic()
        self._lease.spec.renew_time = _now()
        self._lease = self._api.replace_namespaced_lease(
            self._name, self._namespace, self._lease, _request_timeout=(3, 5)
        )
        self._renewed, self._problem = began, ""

    def _refusal(self, lease: Any, holder: str) -> ConfigError:
        run, _, pod = holder.partition("/")
        return ConfigError(
            f"the policy replicas of the lease {self._namespace}/{lease.metadata.name} belong to "
            f"the run '{run}', whose trainer {pod} is alive; wait for it, stop it, or give the "
            f"run '{self._run}' replicas and a lease of its own."
        )

    def _forbidden(self, error: Any) -> ConfigError:
        return ConfigError(
            f"the API refuses the lease {self._namespace}/{self._name} ({error.status} "
            f"{error.reason}); the trainer's ServiceAccount needs get, create and update of leases "
            "in coordination.k8s.io, or set publish.lease to null."
        )


@contextlib.contextmanager
def hold_lease(config: PPOConfig, is_abandoned: Callable[[], bool]) -> Iterator[PublishLease]:
    """The lease that ``config.publish.lease`` names, in the namespace of this pod."""
    assert config.publish.lease is not None
    pod = this_pod()
    lease = FleetLease(
        open_api(),
        own_namespace(),
        config.publish.lease,
        run=config.run_id or config.out.resolve().name,
        # A container that starts again in its pod is the same holder; elsewhere a process is.
        holder=pod.name if pod else f"{socket.gethostname()}-{secrets.token_hex(4)}",
    )
    try:
        lease.acquire(config.services.wait_s, is_abandoned)
        yield lease
    finally:
        lease.release()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _connection_errors() -> tuple[type[Exception], ...]:
    import urllib3

    return (urllib3.exceptions.HTTPError,)
