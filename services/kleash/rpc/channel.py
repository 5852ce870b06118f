"""Channels as every bundled client opens them: balanced, health-checked, kept alive, retrying, and
with the credentials of the environment."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence

import grpc

from kleash.rpc.client_metrics import counted
from kleash.rpc.credentials import Credentials
from kleash.rpc.pem import Pem
from kleash.rpc.reloading import Reloading
from kleash.rpc.rotating_channel import RotatingChannel

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 1024 * 1024

RETRY_POLICY = {
    # Waits 0.2 + 0.4 + 0.8 + 1.6 s, each +-20 %: 3 s in all. A server's pushback replaces a wait.
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}


def connect(
    address: str,
    *,
    service: str,
    methods_to_retry: Sequence[str],
    checks_health: bool = True,
    credentials: Credentials | None = None,
) -> grpc.Channel:
    """Open a channel to ``address`` ("host:port", or a gRPC target such as "dns:///reward:50051").

    ``service`` is the full name whose health decides which servers get calls. ``methods_to_retry``
    are its idempotent methods: only those are tried again, on UNAVAILABLE and RESOURCE_EXHAUSTED.
    Without ``checks_health`` a server gets calls once it is reached, ready or not.
    ``credentials`` are those of the environment when not given. Raises ConfigError for files of
    theirs that cannot be used.
    """
    own = Credentials.from_env() if credentials is None else credentials
    options = channel_options(service, methods_to_retry, own, checks_health)
    if own.is_empty:
        return counted(grpc.insecure_channel(target(address), options=options))

    def open_channel(pem: Pem | None) -> grpc.Channel:
        if pem is None:
            return grpc.insecure_channel(target(address), options=options)
        return grpc.secure_channel(target(address), tls_credentials(pem), options=options)

    return counted(RotatingChannel(open_channel, *watch(own)))


def watch(credentials: Credentials) -> tuple[Reloading[Pem] | None, Callable[[], str] | None]:
    """TLS files and token of a channel, kept up to date. Raises ConfigError."""
    pem, token = credentials.watch_pem(), credentials.watch_token()
    if token is not None and pem is None:
        _warn_about_plain_token()
    return pem, token


def tls_credentials(pem: Pem) -> grpc.ChannelCredentials:
    """As gRPC takes them."""
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)


@functools.cache
def _warn_about_plain_token() -> None:
    """Once a process."""
    logger.warning(
        "the token of this client travels in clear, as KLEASH_TLS_CA is not set: keep others off "
        "this network, with a NetworkPolicy at least"
    )


def channel_options(
    service: str,
    methods_to_retry: Sequence[str],
    credentials: Credentials,
    checks_health: bool = True,
) -> list[tuple[str, str | int]]:
    """Channel arguments of ``connect``."""
    named: list[tuple[str, str | int]] = []
    if credentials.server_name:
        named.append(("grpc.ssl_target_name_override", credentials.server_name))
    if credentials.caller:
        named.append(("grpc.primary_user_agent", f"kleash-{credentials.caller}"))
    config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if checks_health:
        config["healthCheckConfig"] = {"serviceName": service}
    if methods_to_retry:
        names = [{"service": service, "method": method} for method in methods_to_retry]
        config["methodConfig"] = [{"name": names, "retryPolicy": RETRY_POLICY}]
        # Retries stop while fewer than half of the tokens are left: an outage is not multiplied,
        # and a burst of refusals by a full queue still is retried.
        config["retryThrottling"] = {"maxTokens": 500, "tokenRatio": 0.5}
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A call larger than this buffer is sent once and never retried; the default is 256 KiB.
        ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Channels of one process to one address would otherwise share connections, and a test's
        # or a client's close would not be seen by the server.
        ("grpc.use_local_subchannel_pool", 1),
        # Reconnect soon after a restart; the default grows to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # When a server closes its connections, where the next one is is looked up at once; by
        # default no more than every 30 s, and calls fail meanwhile.
        ("grpc.dns_min_time_between_resolutions_ms", 500),
        *named,
    ]


def target(address: str) -> str:
    """The gRPC target of an address."""
    return address if "://" in address or address.startswith("unix:") else f"dns:///{address}"
