"""The ports of a server: listening, or saying in one sentence why not; the page of the metrics."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

import grpc
import prometheus_client

from kleash.base import metrics
from kleash.base.errors import UserError
from kleash.base.version import software_version


def bind(
    server: grpc.aio.Server,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None,
    *,
    key: str,
) -> int:
    """Listen, with TLS when there are ``credentials``; returns the port.

    Raises UserError that names ``key``, the port's in the configuration.
    """
    host = _without_ipv6(host)
    # gRPC does not tell why a port cannot be bound, and logs a line of its own: ask a socket first.
    _bound(_addresses(host, port)[0], host, port, key).close()
    try:
        if credentials is not None:
            return server.add_secure_port(join(host, port), credentials)
        return server.add_insecure_port(join(host, port))
    except RuntimeError:
        raise UserError(f"port {port} on {host} is in use; choose another with --{key}.") from None


def listen(host: str, port: int, *, key: str) -> list[socket.socket]:
    """Sockets that are bound to every address of ``host``. Raises UserError that names ``key``."""
    host = _without_ipv6(host)
    first, *others = _addresses(host, port)
    sockets = [_bound(first, host, port, key)]
    for address in others:
        try:
            sockets.append(_bound(address, host, port, key))
        except UserError:
            for each in sockets:
                each.close()
            raise
    return sockets


def _addresses(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise UserError(
            f"host '{host}' cannot be resolved; set --server.host to an address of this machine."
        ) from None


def _bound(address: Any, host: str, port: int, key: str) -> socket.socket:
    family, kind, protocol, _, place = address
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(place)
    except OSError as error:
        bound.close()
        raise _port_error(error, host, port, key) from None
    return bound


def _without_ipv6(host: str) -> str:
    """``host``, but 0.0.0.0 in place of ::, every address, where the kernel has no IPv6."""
    if host != "::":
        return host
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return "0.0.0.0"
    return host


def _port_error(error: OSError, host: str, port: int, key: str) -> UserError:
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(
            f"{host} is not an address of this machine; set --server.host to one that is."
        )
    if error.errno == errno.EACCES:
        return UserError(f"port {port} on {host} needs privileges; choose another with --{key}.")
    return UserError(f"port {port} on {host} is in use; choose another with --{key}.")


def serve_metrics(host: str, port: int) -> Callable[[], None] | None:
    """Start the /metrics page, unless ``port`` is 0; returns what ends it."""
    if not port:
        return None
    host = _without_ipv6(host)
    prometheus_client.disable_created_metrics()
    metrics.BUILD_INFO.labels(software_version()).set(1)
    try:
        page, thread = prometheus_client.start_http_server(port, addr=host)
    except OSError as error:
        raise _port_error(error, host, port, "server.metrics_port") from None

    def end() -> None:
        page.shutdown()
        page.server_close()
        thread.join()

    return end


def join(host: str, port: int) -> str:
    """Both as an address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
