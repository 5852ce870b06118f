"""Policy replicas that come and go while a run lives.

    discovery ──► addresses ──► candidates ──answers GetPolicy──► members ──not found──► left
                                    │ does not fit the run           │
                                    ▼                                │
                                 refused, and asked again            │
    the trainer sees two mappings, number to client, of the members ─┘

A number is never used again. Clients of a replica that left stay open for a while: a call may be
under way, and a mapping that was just read may still name it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from kleash.base.errors import ConfigError
from kleash.client.policy import PolicyClient
from kleash.client.weights import WeightsClient
from kleash.cluster.discovery import RETRY_S, Discover, by_dns, by_endpoint_slices
from kleash.policy.v1 import policy_pb2
from kleash.ppo.config import ServicesConfig
from kleash.ppo.services import (
    Policy,
    Services,
    open_policy,
    open_scorers,
    open_weights,
    trainer_credentials,
    wait_for_scorers,
)
from kleash.rpc.errors import ServiceError, Unavailable
from kleash.weights.coordinator import Replica

logger = logging.getLogger(__name__)

X = TypeVar("X")

PROBE_S = 10.0
"""For a replica to say what it is; it becomes a member then."""
PAUSE_S = 1.0
"""Between two looks at the candidates."""
PROBE_THREADS = 8

Misfit = Callable[[policy_pb2.GetPolicyResponse], str]
"""Why a replica that says this of itself cannot work for the run, as a clause; "" when it can."""


@dataclass(frozen=True, eq=False)
class _Member:
    address: str
    policy: PolicyClient
    weights: WeightsClient

    def close(self) -> None:
        self.policy.close()
        self.weights.close()


class _Live(Mapping[int, X]):
    """The members as they are now; one that just left can still be had by its number."""

    def __init__(self, fleet: ElasticFleet, client: Callable[[_Member], X]) -> None:
        self._fleet = fleet
        self._client = client

    def __getitem__(self, number: int) -> X:
        return self._client(self._fleet.open[number])

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._fleet.members))

    def __len__(self) -> int:
        return len(self._fleet.members)


class ElasticFleet:
    """Follows a discovery in threads; ``close`` ends them."""

    def __init__(
        self, config: ServicesConfig, discover: Discover, misfit: Misfit = lambda _: ""
    ) -> None:
        self._config = config
        self._misfit = misfit
        self._refused: dict[str, str] = {}
        """By address, why a candidate is no member, as a clause. Replaced, never changed."""
        self._misfits: frozenset[str] = frozenset()
        """Addresses of those that answered and cannot work for the run."""
        self._discover = discover
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._found: frozenset[str] = frozenset()
        self._numbers = 0
        self._left_at: dict[int, float] = {}
        self.open: dict[int, _Member] = {}
        """Members, and those that left a short while ago. Replaced, never changed."""
        self.members: frozenset[int] = frozenset()
        self.policies: Mapping[int, Policy] = _Live(self, lambda member: member.policy)
        self.weights: Mapping[int, Replica] = _Live(self, lambda member: member.weights)
        self._threads = [
            threading.Thread(target=self._follow, name="kleash-discovery", daemon=True),
            threading.Thread(target=self._admit, name="kleash-fleet", daemon=True),
        ]

    def start(self) -> None:
        """Start to look."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the threads and close every client."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        self._threads[1].join()
        for member in self.open.values():
            member.close()

    def wait_for_one(self, is_abandoned: Callable[[], bool]) -> None:
        """Until there is a member.

        Raises Unavailable that says what was seen, ConfigError when all that were found cannot
        work for the run.
        """
        deadline = time.monotonic() + self._config.wait_s
        name = self._config.policy[0]
        logger.info("waiting for a policy replica at %s", name)
        while not self.members:
            found = self._found
            refused = {its: why for its, why in self._refused.items() if its in found}
            if found and found <= self._misfits:
                raise ConfigError(
                    f"no policy replica of {name} can work for this run: {_list(refused)}; serve "
                    "the run's SFT checkpoint there, or correct services.policy."
                )
            if time.monotonic() > deadline or is_abandoned():
                seen = _list({its: refused.get(its, "") for its in found}) or "no address at all"
                remedy = (
                    "correct what these answers name: the trainer's credentials "
                    "(KLEASH_TOKEN_FILE, KLEASH_TLS_CERT), server.auth of the policy, or "
                    "services.policy"
                    if refused
                    else "are its pods running? kubectl get pods shows them"
                )
                raise Unavailable(
                    f"no policy replica of {name} answered within "
                    f"{self._config.wait_s:g} s (found: {seen}); {remedy}.",
                    reason="NO_REPLICA",
                )
            with self._changed:
                self._changed.wait(PAUSE_S)

    def _follow(self) -> None:
        while not self._stopping.is_set():
            try:
                for found in self._discover(self._stopping):
                    if self._stopping.is_set():
                        return
                    if found != self._found:
                        with self._changed:
                            self._found = found
                            self._changed.notify_all()
            except Exception:  # replicas must be followed as long as the run lives
                logger.exception("discovery of policy replicas has failed; beginning again")
            self._stopping.wait(RETRY_S)

    def _admit(self) -> None:
        probes: dict[str, Future[bool]] = {}
        with ThreadPoolExecutor(PROBE_THREADS, "probe") as pool:
            while not self._stopping.is_set():
                found = self._found
                self._drop(found)
                known = {self.open[number].address for number in self.members}
                for address in found - known - probes.keys():
                    probes[address] = pool.submit(self._answers, address)
                for address in [address for address, probe in probes.items() if probe.done()]:
                    if probes.pop(address).result() and address in self._found:
                        self._join(address)
                with self._changed:
                    self._changed.wait(PAUSE_S)
            pool.shutdown(wait=False, cancel_futures=True)

    def _answers(self, address: str) -> bool:
        """Whether a policy service is there that fits the run; it may be loading for minutes."""
        is_misfit = False
        try:
            with PolicyClient(
                address,
                timeout_s=PROBE_S,
                checks_health=False,
                credentials=trainer_credentials(),
            ) as probe:
                why = self._misfit(probe.get_policy())
                is_misfit = bool(why)
        except Unavailable:
            return False
        except ServiceError as error:
            why = str(error).rstrip(".")
        with self._changed:
            is_news = self._refused.get(address, "") != why
            others = {its: each for its, each in self._refused.items() if its != address}
            self._refused = {**others, address: why} if why else others
            rest = self._misfits - {address}
            self._misfits = rest | {address} if is_misfit else rest
            self._changed.notify_all()
        if why and is_news:
            logger.warning(
                "the policy replica at %s is not used: %s; it is asked again every %g s",
                address,
                why,
                PROBE_S,
                extra={"event": "PolicyReplicaRefused"},
            )
        if why:
            self._stopping.wait(PROBE_S)
        return not why

    def _join(self, address: str) -> None:
        number = self._numbers
        self._numbers += 1
        member = _Member(address, open_policy(address, self._config), open_weights(address))
        with self._changed:
            self.open = {**self.open, number: member}
            self.members |= {number}
            self._changed.notify_all()
        logger.info(
            "policy replica %d joined at %s; there are %d now",
            number,
            address,
            len(self.members),
            extra={"event": "PolicyReplicaJoined"},
        )

    def _drop(self, found: frozenset[str]) -> None:
        now = time.monotonic()
        for number in sorted(self.members):
            if self.open[number].address not in found:
                self.members -= {number}
                self._left_at[number] = now
                logger.warning(
                    "policy replica %d at %s has left; there are %d now",
                    number,
                    self.open[number].address,
                    len(self.members),
                    extra={"event": "PolicyReplicaLeft"},
                )
        for number, left_at in list(self._left_at.items()):
            if now - left_at > self._config.generate_timeout_s:
                self.open[number].close()
                self.open = {key: its for key, its in self.open.items() if key != number}
                del self._left_at[number]


def _list(whys: Mapping[str, str]) -> str:
    """Addresses with what is known of each."""
    return ", ".join(f"{its} ({why})" if why else its for its, why in sorted(whys.items()))


@contextlib.contextmanager
def connect_elastic(
    config: ServicesConfig,
    is_abandoned: Callable[[], bool] = lambda: False,
    *,
    misfit: Misfit = lambda _: "",
) -> Iterator[Services]:
    """Find the policy replicas and follow them; wait for the first one and for the scorers.

    Replicas of which ``misfit`` says something are not used, whenever they come. Raises Unavailable
    that names the service, its address and how to start it, and ConfigError.
    """
    (address,) = config.policy
    how = by_dns if config.discovery == "dns" else by_endpoint_slices
    fleet = ElasticFleet(config, how(address), misfit)
    with contextlib.ExitStack() as stack:
        stack.callback(fleet.close)
        fleet.start()
        reward, reference = stack.enter_context(open_scorers(config))
        fleet.wait_for_one(is_abandoned)
        wait_for_scorers(reward, reference, config, is_abandoned)
        yield Services(fleet.policies, fleet.weights, reward, reference)
