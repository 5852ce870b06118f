"""Where the policy replicas are now: endpoints of a headless Service, or addresses of a name.

A pod with addresses of both IP versions is one replica, at its IPv4 address.

EndpointSlices, listed and watched ──┐
                                     ├──► a set of "host:port" whenever it may have changed
DNS, looked up every few seconds ────┘    (and the fall-back where the API cannot be asked)
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from kleash.base.errors import ConfigError
from kleash.cluster.api import open_api, own_namespace

logger = logging.getLogger(__name__)

LOOK_UP_S = 3.0
"""Between two looks at DNS, whose records live for 5 s or more in a cluster."""
WATCH_S = 60
"""A watch ends after this long and all slices are listed again: nothing missed stays missed."""
RETRY_S = 3.0

NO_ADDRESS = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
"""What a resolver says of a headless Service without endpoints: nobody is there."""

Discover = Callable[[threading.Event], Iterator[frozenset[str]]]
"""Yields the addresses now and at every change, until the event is set. One that cannot be told
from the last known ones yields nothing."""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "dns:///host:port". Raises ConfigError."""
    host, _, port = address.removeprefix("dns:///").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"'{address}' is not host:port; write it as in kleash-policy:50051.")
    return host.strip("[]"), int(port)


def by_dns(address: str) -> Discover:
    """The addresses that the name has: of IPv4, or of IPv6 where it has no others."""
    host, port = split_address(address)

    def discover(stopping: threading.Event) -> Iterator[frozenset[str]]:
        last = ""
        while not stopping.is_set():
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                # A name does not tell which of its addresses are one pod's.
                families = {its[0] for its in found}
                family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
                yield frozenset(_join(str(its[4][0]), port) for its in found if its[0] is family)
                last = ""
            except OSError as error:
                is_empty = isinstance(error, socket.gaierror) and error.errno in NO_ADDRESS
                # A resolver that is away says nothing about the replicas.
                if is_empty:
                    yield frozenset()
                if str(error) != last:
                    level = logging.INFO if is_empty else logging.WARNING
                    logger.log(
                        level,
                        "looking up %s: %s; it is looked up again every %g s. Where that goes on, "
                        "compare services.policy with kubectl get services",
                        host,
                        error,
                        LOOK_UP_S,
                    )
                last = str(error)
            stopping.wait(LOOK_UP_S)

    return discover


def by_endpoint_slices(address: str, api: Any | None = None) -> Discover:
    """The endpoints of the Service that ``address`` names, "service[.namespace[.svc...]]:port".

    Endpoints that are not ready count: a replica that waits for weights is not. Those that are
    terminating do not. Where the API is forbidden or out of reach DNS takes its place.
    """
    host, port = split_address(address)
    service, _, rest = host.partition(".")
    namespace = rest.partition(".")[0] or own_namespace()

    def discover(stopping: threading.Event) -> Iterator[frozenset[str]]:
        looked_up = by_dns(address)(stopping)
        told = ""
        while not stopping.is_set():
            try:
                slices = _Slices(api or open_api(), service, namespace, port)
                yield slices.list()
                yield from slices.watch(stopping)
                return
            except (ConfigError, *_api_errors()) as error:
                if _reason(error) != told:
                    told = _reason(error)
                    logger.warning(
                        "EndpointSlices of %s/%s cannot be read (%s); looking up %s instead",
                        namespace,
                        service,
                        told,
                        host,
                        extra={"event": "DiscoveryFellBack"},
                    )
                # Missing rights stay missing; an API that is away comes back.
                if isinstance(error, ConfigError) or getattr(error, "status", 0) in (401, 403):
                    yield from looked_up
                    return
                yield next(looked_up, frozenset())

    return discover


class _Slices:
    """The EndpointSlices of one Service."""

    def __init__(self, api: Any, service: str, namespace: str, port: int) -> None:
        import kubernetes

        self._api: Any = kubernetes.client.DiscoveryV1Api(api)
        self._namespace = namespace
        self._selector = f"kubernetes.io/service-name={service}"
        self._port = port
        self._known: dict[str, Any] = {}
        self._chosen: dict[str, str] = {}
        """The address at which each pod is a replica, by the pod's uid."""
        self._version = ""

    def list(self) -> frozenset[str]:
        """Read all of them."""
        answer = self._api.list_namespaced_endpoint_slice(
            self._namespace, label_selector=self._selector, _request_timeout=(5, 15)
        )
        self._known = {its.metadata.name: its for its in answer.items}
        self._version = answer.metadata.resource_version
        return self._addresses()

    def watch(self, stopping: threading.Event) -> Iterator[frozenset[str]]:
        """Changes; a watch that breaks starts again, and the last known addresses stay."""
        import kubernetes

        while not stopping.is_set():
            watch = kubernetes.watch.Watch()
            try:
                for event in watch.stream(
                    self._api.list_namespaced_endpoint_slice,
                    self._namespace,
                    label_selector=self._selector,
                    resource_version=self._version,
                    timeout_seconds=WATCH_S,
                    _request_timeout=(5, WATCH_S + 15),
                ):
                    if stopping.is_set():
                        return
                    change: Any = event
                    self._take(change["type"], change["object"])
                    yield self._addresses()
                yield self.list()
            except _api_errors() as error:
                logger.info("watching EndpointSlices again: %s", _reason(error))
                stopping.wait(RETRY_S)
                self._version = ""
            finally:
                watch.stop()
            if not self._version and not stopping.is_set():
                try:
                    yield self.list()
                except _api_errors():
                    stopping.wait(RETRY_S)

    def _take(self, kind: str, changed: Any) -> None:
        if kind == "DELETED":
            self._known.pop(changed.metadata.name, None)
        else:
            self._known[changed.metadata.name] = changed

    def _addresses(self) -> frozenset[str]:
        """One for each pod that does not terminate; once chosen it stays while it is listed."""
        found: dict[str, list[str]] = {}
        leaving: set[str] = set()
        for each in sorted(self._known.values(), key=lambda its: its.address_type):  # IPv4, IPv6
            for endpoint in each.endpoints or ():
                if not endpoint.addresses:
                    continue
                first = endpoint.addresses[0]  # others are equivalent, says the API
                pod = (endpoint.target_ref and endpoint.target_ref.uid) or first
                found.setdefault(pod, []).append(first)
                if endpoint.conditions and endpoint.conditions.terminating:
                    leaving.add(pod)
        before = self._chosen
        self._chosen = {
            pod: before[pod] if before.get(pod) in addresses else addresses[0]
            for pod, addresses in found.items()
            if pod not in leaving
        }
        return frozenset(_join(address, self._port) for address in self._chosen.values())


def _api_errors() -> tuple[type[Exception], ...]:
    import kubernetes
    import urllib3

    return (kubernetes.client.ApiException, urllib3.exceptions.HTTPError)


def _reason(error: Exception) -> str:
    """One line: an ApiException prints headers and body."""
    status, reason = getattr(error, "status", None), getattr(error, "reason", None)
    return f"{status} {reason}" if status else " ".join(str(error).split())[:200]


def _join(address: str, port: int) -> str:
    return (
        f"[{address}]:{port}" if ipaddress.ip_address(address).version == 6 else f"{address}:{port}"
    )
