"""Where the policy replicas are now: endpoints of a headless Service, or addresses of a name.

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
    """Every address that the name has."""
    host, port = split_address(address)

    def discover(stopping: threading.Event) -> Iterator[frozenset[str]]:
        last = ""
        while not stopping.is_set():
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                yield frozenset(_join(str(its[4][0]), port) for its in found)
                last = ""
            except OSError as error:
                # A headless Service without endpoints has no address: nobody is there. A resolver
                # that is away says nothing about the replicas.
                if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
                    yield frozenset()
                if str(error) != last:
                    logger.warning("looking up %s: %s", host, error)
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
        return frozenset(
            _join(address, self._port)
            for each in self._known.values()
            for endpoint in each.endpoints or ()
            if not (endpoint.conditions and endpoint.conditions.terminating)
            for address in endpoint.addresses or ()
        )


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
