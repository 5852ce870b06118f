"""What the dashboards show: rows of panels, each with the expressions it asks Prometheus for.

The series are those that kleash.base.metrics defines; every expression names the variables
$namespace, $job and $instance.
"""

from __future__ import annotations

from dataclasses import dataclass

PODS = 'namespace="$namespace", job=~"$job", instance=~"$instance"'
REWARD = f'{PODS}, grpc_service=~"kleash[.]reward[.].*"'
FAILED = 'grpc_code=~"UNKNOWN|DEADLINE_EXCEEDED|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS"'
BUDGET = 0.005
"""Share of calls that may fail; files/rules/slo.yaml alerts on the same."""


@dataclass(frozen=True)
class Panel:
    """A panel: what it shows, in which unit of Grafana, and (legend, expression) of each line."""

    title: str
    description: str
    unit: str
    targets: tuple[tuple[str, str], ...]
    kind: str = "lines"
    """lines, stack, number or heatmap."""
    span: int = 8
    """Of the 24 columns."""


@dataclass(frozen=True)
class Row:
    """Panels below one heading."""

    title: str
    panels: tuple[Panel, ...]


def per_second(name: str, by: str, labels: str = PODS) -> str:
    """Rate of a counter, summed by labels."""
    return f"sum by ({by}) (rate({name}{{{labels}}}[$__rate_interval]))"


def quantile(share: float, name: str, by: str = "", labels: str = PODS) -> str:
    """A quantile of a histogram over all replicas, by labels."""
    kept = f"{by}, le" if by else "le"
    rate = f"rate({name}_bucket{{{labels}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by ({kept}) ({rate}))"


def mean(name: str, by: str) -> str:
    """Mean of what a histogram counted."""
    return f"{per_second(f'{name}_sum', by)} / {per_second(f'{name}_count', by)}"


def quantiles(name: str, labels: str = PODS) -> tuple[tuple[str, str], ...]:
    """Median and tail."""
    return tuple(
        (f"p{share * 100:g}", quantile(share, name, labels=labels)) for share in (0.5, 0.95, 0.99)
    )


QUEUE = (
    Panel(
        "Tokens that wait",
        "Tokens in the queue of each service. Rises for long: add replicas.",
        "short",
        (("{{service}}", f"sum by (service) (kleash_queue_tokens{{{PODS}}})"),),
    ),
    Panel(
        "Wait for the model, p95",
        "Seconds between the arrival of a call and its first forward pass.",
        "s",
        (("{{service}}", quantile(0.95, "kleash_queue_wait_seconds", "service")),),
    ),
    Panel(
        "Refused calls",
        "queue_full: add replicas. deadline: callers wait too briefly, or the queue is long. "
        "too_large: the caller should split.",
        "reqps",
        (
            (
                "{{service}} {{reason}}",
                per_second("kleash_requests_rejected_total", "service, reason"),
            ),
        ),
    ),
)
BATCHES = (
    Panel(
        "Items in a forward pass, mean",
        "1 under load: callers send one item at a time and wait for the answer.",
        "short",
        (("{{service}}", mean("kleash_batch_items", "service")),),
    ),
    Panel(
        "Padding, mean share",
        "Share of a forward pass that is padding. Above a half: lower limits.max_batch_tokens.",
        "percentunit",
        (("{{service}}", mean("kleash_batch_padding_ratio", "service")),),
    ),
    Panel(
        "Forward pass, p95",
        "Seconds of one forward pass.",
        "s",
        (("{{service}}", quantile(0.95, "kleash_compute_seconds", "service")),),
    ),
)

_FAILED_CALLS = per_second("grpc_server_handled_total", "job", f"{REWARD}, {FAILED}")
_ALL_CALLS = per_second("grpc_server_handled_total", "job", REWARD)
"""A code that was never returned has no series: a share of nothing is 0."""

REWARD_SLO = (
    Row(
        "Objective: 99.5 % of calls answered",
        (
            Panel(
                "Failed calls",
                "Share of calls that failed by the server's fault. The objective is at most 0.5 %.",
                "percentunit",
                (("{{job}}", f"({_FAILED_CALLS} or 0 * {_ALL_CALLS}) / {_ALL_CALLS}"),),
            ),
            Panel(
                "Burn rate of the error budget",
                "1 uses the 30 days' budget up in 30 days. Above 14.4 in the last hour pages.",
                "short",
                tuple(
                    (
                        window,
                        f"max(kleash:grpc_failed_calls:ratio_rate{window}"
                        f'{{namespace="$namespace", job=~"$job"}}) / {BUDGET}',
                    )
                    for window in ("1h", "6h")
                ),
            ),
            Panel(
                "Replicas that serve",
                "Replicas whose model is loaded.",
                "short",
                (("replicas", f'sum(kleash_model_loaded{{{PODS}, service="reward"}})'),),
                kind="number",
            ),
        ),
    ),
    Row(
        "Calls",
        (
            Panel(
                "Calls by method",
                "Calls completed.",
                "reqps",
                (
                    (
                        "{{grpc_method}}",
                        per_second("grpc_server_handled_total", "grpc_method", REWARD),
                    ),
                ),
            ),
            Panel(
                "Calls by status",
                "RESOURCE_EXHAUSTED is intended shedding; INTERNAL is a bug of ours.",
                "reqps",
                (("{{grpc_code}}", per_second("grpc_server_handled_total", "grpc_code", REWARD)),),
            ),
            Panel(
                "Duration",
                "Seconds from the start of a unary call to its status.",
                "s",
                quantiles("grpc_server_handling_seconds", f'{REWARD}, grpc_type="unary"'),
            ),
        ),
    ),
    Row("Queue", QUEUE),
    Row("Batches", BATCHES),
    Row(
        "Scores",
        (
            Panel(
                "Scores",
                "Distribution of the scores given. One that moves is the policy's doing, or "
                "another kind of input.",
                "short",
                (("{{le}}", per_second("kleash_reward_score_bucket", "le")),),
                kind="heatmap",
                span=16,
            ),
            Panel(
                "Items by status",
                "NON_FINITE means broken weights.",
                "ops",
                (("{{status}}", per_second("kleash_items_total", "status")),),
            ),
        ),
    ),
)

SERVICES = (
    Row(
        "Health",
        (
            Panel(
                "Models loaded",
                "1 while the service's model is loaded and warm.",
                "short",
                (("{{service}} {{instance}}", f"kleash_model_loaded{{{PODS}}}"),),
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
                "Memory",
                "Resident memory of each process.",
                "bytes",
                (("{{instance}}", f"process_resident_memory_bytes{{{PODS}}}"),),
            ),
        ),
    ),
    Row(
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
        ),
    ),
    Row("Queue", QUEUE),
    Row("Batches", BATCHES),
    Row(
        "Weights of the policy",
        (
            Panel(
                "Version",
                "Version that each replica generates with. They differ during a publish alone.",
                "short",
                (
                    (
                        "{{instance}}",
                        f"kleash_policy_weights_version{{{PODS}}} and on (instance) "
                        f'kleash_model_loaded{{{PODS}, service="policy"}} == 1',
                    ),
                ),
            ),
            Panel(
                "Update, p95",
                "Seconds from the start of a version's preparation to its being served.",
                "s",
                (("p95", quantile(0.95, "kleash_weights_update_seconds")),),
            ),
            Panel(
                "Failed updates",
                "Publishes that replicas refused or broke off.",
                "ops",
                (("{{instance}}", per_second("kleash_weights_update_failures_total", "instance")),),
            ),
        ),
    ),
)

TRAINING = (
    Row(
        "Progress",
        (
            Panel(
                "Steps done",
                "PPO steps, those before a restart included.",
                "short",
                (("step", f"max(kleash_train_step{{{PODS}}})"),),
                kind="number",
                span=4,
            ),
            Panel(
                "Since the last step",
                "Grows beyond several steps: the run waits for a service, or was paused.",
                "s",
                (
                    (
                        "age",
                        f"time() - max(kleash_train_last_step_timestamp_seconds{{{PODS}}} > 0)",
                    ),
                ),
                kind="number",
                span=4,
            ),
            Panel(
                "Seconds of a step by phase",
                "Mean of each phase. generate includes the scoring that it hides.",
                "s",
                (("{{phase}}", mean("kleash_train_phase_seconds", "phase")),),
                kind="stack",
            ),
            Panel(
                "Response tokens",
                "Tokens trained on.",
                "ops",
                (("tokens", per_second("kleash_train_tokens_total", "job")),),
            ),
        ),
    ),
    Row(
        "Reward and leash",
        (
            Panel(
                "Reward",
                "Mean over responses of the score minus the KL's price: what PPO raises.",
                "short",
                (("reward", f"kleash_train_reward_mean{{{PODS}}}"),),
            ),
            Panel(
                "KL to the reference",
                "Nats a response. Grows without a bound: raise kl.coefficient.",
                "short",
                (("KL", f"kleash_train_kl{{{PODS}}}"),),
            ),
            Panel(
                "KL coefficient",
                "Price of a nat. Swings when adaptive: see kl.target and kl.horizon.",
                "short",
                (("coefficient", f"kleash_train_kl_coef{{{PODS}}}"),),
            ),
        ),
    ),
    Row(
        "Update",
        (
            Panel(
                "Entropy",
                "Nats a token. Near 0: the policy has collapsed onto few responses.",
                "short",
                (("entropy", f"kleash_train_entropy{{{PODS}}}"),),
            ),
            Panel(
                "Clipped tokens",
                "Share of tokens whose ratio was clipped. Usual: 1 to 30 %.",
                "percentunit",
                (("clipped", f"kleash_train_clip_fraction{{{PODS}}}"),),
            ),
            Panel(
                "Gradient norm",
                "Before clipping, of the policy and of the value network.",
                "short",
                (("{{model}}", f"kleash_train_grad_norm{{{PODS}}}"),),
            ),
        ),
    ),
)
