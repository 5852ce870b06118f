"""Every process that serves: loaded, moving, busy with what, at which weights."""

from __future__ import annotations

from k8s.dashboards.panels import (
    FAILED,
    PODS,
    Panel,
    Row,
    gauge,
    per_second,
    quantile,
)
from k8s.dashboards.serving import batches, gpu_memory, models, queue

HEALTH = Row(
    "Health",
    (
        Panel(
            "Models loaded",
            "1 while the service's model is loaded and warm.",
            "short",
            (("{{service}} {{instance}}", f"kleash_model_loaded{{{PODS}}}"),),
            between=(0, 1),
        ),
        Panel(
            "Silence of model threads",
            "Seconds since the last sign of life. Grows while calls run: the thread hangs.",
            "s",
            (
                (
                    "{{service}} {{instance}}",
                    f"time() - kleash_batcher_heartbeat_timestamp_seconds{{{PODS}}}",
                ),
            ),
        ),
        Panel(
            "Lateness of event loops, p99",
            "Seconds by which a server's event loop was late. Above 0.1: something holds the "
            "interpreter, and probes may time out.",
            "s",
            (
                (
                    "{{pod}}",
                    quantile(0.99, "kleash_event_loop_lag_seconds", "pod"),
                ),
            ),
        ),
        Panel(
            "Processors used",
            "Seconds of computing in a second: 2 is two cores. At the pod's limit: throttled.",
            "short",
            (("{{pod}}", per_second("process_cpu_seconds_total", "pod")),),
        ),
        Panel(
            "Memory of processes",
            "Resident memory of each process.",
            "bytes",
            (("{{pod}}", f"process_resident_memory_bytes{{{PODS}}}"),),
        ),
        gpu_memory(),
    ),
)

CALLS = Row(
    "Calls",
    (
        Panel(
            "Calls by service",
            "Calls completed.",
            "reqps",
            (("{{grpc_service}}", per_second("grpc_server_handled_total", "grpc_service")),),
        ),
        Panel(
            "Failed calls by service",
            "Calls that failed by the server's fault.",
            "reqps",
            (
                (
                    "{{grpc_service}} {{grpc_code}}",
                    per_second(
                        "grpc_server_handled_total",
                        "grpc_service, grpc_code",
                        f"{PODS}, {FAILED}",
                    ),
                ),
            ),
        ),
        Panel(
            "Calls at work",
            "Calls that the models work on.",
            "short",
            (("{{service}}", f"sum by (service) (kleash_running_requests{{{PODS}}})"),),
        ),
        Panel(
            "Calls whose caller went away",
            "queued: cost nothing. computing: the work was for nothing.",
            "reqps",
            (("{{service}} {{stage}}", per_second("kleash_cancelled_total", "service, stage")),),
        ),
        Panel(
            "Items",
            "Inputs scored, responses generated, by their status.",
            "ops",
            (("{{service}} {{status}}", per_second("kleash_items_total", "service, status")),),
        ),
        Panel(
            "Tokens",
            "Tokens of the items: prompt and response.",
            "ops",
            (("{{service}}", per_second("kleash_item_tokens_sum", "service")),),
        ),
    ),
)

WEIGHTS = Row(
    "Weights of the policy",
    (
        Panel(
            "Version by replica",
            "Version that each replica generates with. They differ during a publish alone.",
            "short",
            (("{{pod}}", gauge("kleash_policy_weights_version", runs="policy")),),
        ),
        Panel(
            "Update, p95",
            "Seconds from the start of a version's preparation to its being served.",
            "s",
            (("{{job}}", quantile(0.95, "kleash_weights_update_seconds", "job")),),
        ),
        Panel(
            "Failed updates",
            "Publishes that replicas refused or broke off.",
            "ops",
            (
                (
                    "{{pod}}",
                    per_second("kleash_weights_update_failures_total", "pod", runs="policy"),
                ),
            ),
        ),
    ),
)

SERVICES = (HEALTH, CALLS, queue(), batches(), WEIGHTS, Row("Models", (models(span=24),)))
