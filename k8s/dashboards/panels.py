"""What a dashboard is made of, and the expressions that its panels ask Prometheus for.

The series are those that kleash.base.metrics and kleash.client export; every selector matches the
variables $namespace, $job and $instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PODS = 'namespace="$namespace", job=~"$job", instance=~"$instance"'
"""Of every selector: the processes that the dashboard's variables choose."""
FAILED = 'grpc_code=~"UNKNOWN|DEADLINE_EXCEEDED|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS"'
"""Codes by which a server failed (OpenTelemetry's list); the chart's alerts count the same."""
BUDGET = 0.005
"""Share of calls that may fail; files/rules/slo.yaml alerts on the same. The chart puts its value
metrics.prometheusRule.thresholds.errorBudget in the place of both."""


@dataclass(frozen=True)
class Panel:
    """A panel: what it shows, in which unit of Grafana, and (legend, expression) of each series."""

    title: str
    description: str
    unit: str
    targets: tuple[tuple[str, str], ...]
    kind: Literal["lines", "stack", "number", "heatmap", "table"] = "lines"
    span: int = 8
    """Of the 24 columns."""
    columns: tuple[tuple[str, str], ...] = ()
    """Of a table, in order: (label, heading)."""
    decimals: int | None = None
    """Digits behind the point; None is Grafana's choice."""
    between: tuple[float | None, float | None] = (None, None)
    """Values that the axis reaches at least, below and above; None follows the curves."""
    alarm_below: float | None = None
    """A number below it is red."""
    has_exemplars: bool = False
    """Mark single calls on the lines, which lead to their traces."""
    joins_gaps: bool = False
    """Draw through moments without a value: what is only known at the end of a step."""


@dataclass(frozen=True)
class Row:
    """Panels below one heading."""

    title: str
    panels: tuple[Panel, ...]


def per_second(name: str, by: str, labels: str = PODS, *, runs: str = "") -> str:
    """Rate of a counter, summed by labels; ``runs`` as in ``quantile``."""
    return f"sum by ({by}) ({_rate(name, labels, runs)})"


def quantile(share: float, name: str, by: str = "", labels: str = PODS, *, runs: str = "") -> str:
    """A quantile of a histogram over all replicas, by labels.

    ``runs`` names a service: only processes that run it count.
    """
    kept = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, sum by ({kept}) ({_rate(f'{name}_bucket', labels, runs)}))"


def quantiles(name: str, labels: str = PODS) -> tuple[tuple[str, str], ...]:
    """Median and tail."""
    return tuple(
        (f"p{share * 100:g}", quantile(share, name, labels=labels)) for share in (0.5, 0.95, 0.99)
    )


def mean(name: str, by: str, labels: str = PODS) -> str:
    """Mean of what a histogram counted; nothing where it counted nothing."""
    total, count = (per_second(f"{name}_{part}", by, labels) for part in ("sum", "count"))
    return f"{total} / ({count} > 0)"


def share_of_calls(which: str, of: str, window: str, by: str = "") -> str:
    """Share of the calls with the labels ``of`` that have the labels ``which``, too, over a window.

    A code that was never returned has no series: a share of nothing is 0.
    """
    function = "rate" if window.startswith("$") else "increase"

    def calls(labels: str) -> str:
        counted = f"{function}(grpc_server_handled_total{{{labels}}}[{window}])"
        return f"sum by ({by}) ({counted})" if by else f"sum({counted})"

    every = calls(of)
    return f"({calls(f'{of}, {which}')} or 0 * {every}) / ({every} > 0)"


def gauge(name: str, labels: str = PODS, *, runs: str = "") -> str:
    """A gauge of the processes that run the service ``runs``, or of all.

    Every process exports every series without labels, as 0 where it has no meaning.
    """
    return f"{name}{{{labels}}}{_of_processes(runs)}"


def _rate(name: str, labels: str, runs: str) -> str:
    return f"rate({name}{{{labels}}}[$__rate_interval]){_of_processes(runs)}"


def _of_processes(runs: str) -> str:
    if not runs:
        return ""
    return f' and on (namespace, job, instance) kleash_model_loaded{{{PODS}, service="{runs}"}}'
