"""The ports of a server: listening, or saying in one sentence why not; the page of the metrics."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import grpc
import prometheus_client

from kleash.base.errors import UserError


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
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise UserError(
            f"host '{host}' cannot be resolved; set --server.host to an address of this machine."
        ) from None
    # gRPC does not tell why a port cannot be bound, and logs a line of its own: ask a socket first.
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise _port_error(error, host, port, key) from None
    try:
        if credentials is not None:
            return server.add_secure_port(join(host, port), credentials)
        return server.add_insecure_port(join(host, port))
    except RuntimeError:
        raise UserError(f"port {port} on {host} is in use; choose another with --{key}.") from None


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
