"""The reward service as its callers see it: does it answer, how fast, what does it refuse."""

from __future__ import annotations

from k8s.dashboards.panels import (
    BUDGET,
    FAILED,
    PODS,
    Panel,
    Row,
    per_second,
    quantiles,
    share_of_calls,
)
from k8s.dashboards.serving import batches, gpu_memory, models, queue

REWARD = f'{PODS}, grpc_service=~"kleash[.]reward[.].*"'
SERVICE = f'{PODS}, service="reward"'
"""$job is every job when all are chosen: the dashboard's own service is named beside it."""
SHED = 'grpc_code="RESOURCE_EXHAUSTED"'

OBJECTIVE = Row(
    "Availability and error budget",
    (
        Panel(
            "Availability, 30 days",
            "Share of calls that did not fail by the server's fault. Errors of callers and "
            "RESOURCE_EXHAUSTED, which is intended, are no failures.",
            "percentunit",
            (("availability", f"1 - {share_of_calls(FAILED, REWARD, '30d')}"),),
            kind="number",
            span=4,
            decimals=3,
        ),
        Panel(
            "Error budget left, 30 days",
            "What is left of the calls that may fail; the chart's errorBudget is their share. "
            "Below 0: the objective is missed.",
            "percentunit",
            (("left", f"1 - {share_of_calls(FAILED, REWARD, '30d')} / {BUDGET}"),),
            kind="number",
            span=4,
            decimals=1,
            alarm_below=0,
        ),
        Panel(
            "Replicas",
            "ready: with a loaded model. target: that Prometheus finds behind the Service, those "
            "that still load or do not answer among them.",
            "short",
            (
                ("ready", f"sum(kleash_model_loaded{{{SERVICE}}})"),
                (
                    "target",
                    f"count(up{{{PODS}}} and on (namespace, job) kleash_model_loaded{{{SERVICE}}})",
                ),
            ),
            kind="number",
            span=4,
        ),
        Panel(
            "Availability",
            "The same share at each moment.",
            "percentunit",
            (
                (
                    "{{job}}",
                    f"1 - {share_of_calls(FAILED, REWARD, '$__rate_interval', 'job')}",
                ),
            ),
            span=12,
            between=(None, 1),
        ),
        Panel(
            "Burn rate of the error budget",
            "1 uses the 30 days' budget up in 30 days. Above 14.4 in the last hour, or 6 in the "
            "last six, pages.",
            "short",
            tuple(
                (window, f"{share_of_calls(FAILED, REWARD, window)} / {BUDGET}")
                for window in ("1h", "6h")
            ),
        ),
        Panel(
            "Failed calls",
            "Calls that failed by the server's fault, by method and status. INTERNAL is a bug of "
            "ours: the log has its trace.",
            "reqps",
            (
                (
                    "{{grpc_method}} {{grpc_code}}",
                    per_second(
                        "grpc_server_handled_total",
                        "grpc_method, grpc_code",
                        f"{REWARD}, {FAILED}",
                    ),
                ),
            ),
        ),
        Panel(
            "Calls shed",
            "Share of calls refused with RESOURCE_EXHAUSTED and a time to try again: an indicator "
            "of its own, beside availability. Above 0 for long: add replicas.",
            "percentunit",
            (("{{job}}", share_of_calls(SHED, REWARD, "$__rate_interval", "job")),),
        ),
    ),
)

CALLS = Row(
    "Calls",
    (
        Panel(
            "Calls by method",
            "Calls completed, whatever their status.",
            "reqps",
            (("{{grpc_method}}", per_second("grpc_server_handled_total", "grpc_method", REWARD)),),
        ),
        Panel(
            "Calls by method and status",
            "RESOURCE_EXHAUSTED is intended shedding; INVALID_ARGUMENT and FAILED_PRECONDITION "
            "are the caller's; INTERNAL is a bug of ours.",
            "reqps",
            (
                (
                    "{{grpc_method}} {{grpc_code}}",
                    per_second("grpc_server_handled_total", "grpc_method, grpc_code", REWARD),
                ),
            ),
        ),
        Panel(
            "Duration",
            "Seconds from the start of a unary call to its status.",
            "s",
            quantiles("grpc_server_handling_seconds", f'{REWARD}, grpc_type="unary"'),
            has_exemplars=True,
        ),
    ),
)

SCORES = Row(
    "Scores",
    (
        Panel(
            "Distribution of scores",
            "Scores given a second, between two bounds. A distribution that moves is the policy's "
            "doing, or another kind of input.",
            "short",
            (("{{le}}", per_second("kleash_reward_score_bucket", "le")),),
            kind="heatmap",
            span=16,
        ),
        Panel(
            "Failed items by status",
            "Items without a score. NON_FINITE means broken weights; FAILED, a function or a "
            "remote model that did not answer; the others are the caller's.",
            "ops",
            (
                (
                    "{{status}}",
                    per_second("kleash_items_total", "status", f'{SERVICE}, status!="OK"'),
                ),
            ),
        ),
    ),
)

REWARD_SLO = (
    OBJECTIVE,
    CALLS,
    queue(SERVICE),
    batches(SERVICE),
    SCORES,
    Row("Models", (models(SERVICE), gpu_memory(runs="reward"))),
)
