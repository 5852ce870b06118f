"""Metrics of calls that a client makes; only processes that ask for them load this module.

Apart from kleash.base.metrics, which would put the series of a service into the registry of an
application that merely calls one.
"""

from __future__ import annotations

from kleash.base.metric import Group
from kleash.base.metric_labels import (
    GRPC_CODE,
    GRPC_METHOD,
    GRPC_SERVICE,
    GRPC_TYPE,
    LATENCY_S,
)

CLIENT = Group(
    "Client",
    "Of the bundled clients, in processes that ask for them: the trainer, and any other where "
    "`KLEASH_CLIENT_METRICS=1` or `kleash.client.metrics.enable()`. The names of "
    "go-grpc-prometheus. A call is one attempt of the client; what gRPC itself repeats below, on "
    "UNAVAILABLE and RESOURCE_EXHAUSTED, is within it.",
)
CLIENT_STARTED = CLIENT.counter(
    "grpc_client_started_total",
    "Calls started.",
    unit="calls",
    labels=(GRPC_TYPE, GRPC_SERVICE, GRPC_METHOD),
    formula="One more for each call, before anything is sent.",
    remedy="Stays above `grpc_client_handled_total`: so many calls are under way.",
)
CLIENT_HANDLED = CLIENT.counter(
    "grpc_client_handled_total",
    "Calls completed, by status as the client sees it.",
    unit="calls",
    labels=(GRPC_TYPE, GRPC_SERVICE, GRPC_METHOD, GRPC_CODE),
    formula="One more when a call's status is known; one that was given up counts as CANCELLED.",
    remedy="UNAVAILABLE: no server is reached or ready, or a NetworkPolicy is between. "
    "DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED: the service is full; see its queue. UNAUTHENTICATED, "
    "PERMISSION_DENIED: credentials, see [security.md](security.md).",
)
CLIENT_HANDLING_SECONDS = CLIENT.histogram(
    "grpc_client_handling_seconds",
    "Seconds from the start of a call to its status.",
    unit="s",
    labels=(GRPC_TYPE, GRPC_SERVICE, GRPC_METHOD),
    buckets=LATENCY_S,
    formula="Wall time, connecting and gRPC's own attempts included; of a stream to its end. Has "
    "the id of the trace as exemplar.",
    remedy="Above `grpc_server_handling_seconds` of the service: the network, attempts in vain, or "
    "a client that does not read its stream.",
)
CLIENT_RETRIES = CLIENT.counter(
    "kleash_client_retries_total",
    "Calls made once more because the service was busy.",
    unit="calls",
    labels=(GRPC_SERVICE, GRPC_METHOD),
    formula="One more when a client has waited as long as a busy service asked it to, and calls "
    "again; each is also a call above.",
    remedy="Rises steadily: the service needs replicas, or there are too many callers.",
)

GROUPS = (CLIENT,)
