"""A metric with all that is to be known about it. Which metrics there are is in metrics.py.

    QUEUE = Group("Queue", "What an item is.")
    TOKENS = QUEUE.gauge("kleash_queue_tokens", "Tokens that wait.", unit=..., ...)

``Group.gauge`` and the others return the metric of prometheus_client, in its default registry, and
note the rest for docs/metrics.md and the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Label:
    """A label, and what keeps the number of its values small."""

    name: str
    values: tuple[str, ...] = ()
    """All that it can be; empty where ``rule`` says what it can be."""
    rule: str = ""

    def __post_init__(self) -> None:
        assert bool(self.values) != bool(self.rule), f"label {self.name}: either values or a rule"


@dataclass(frozen=True)
class Metric:
    """What a metric is and what to do about it."""

    name: str
    """As Prometheus stores it; a histogram has _bucket, _sum and _count behind it."""
    kind: Kind
    help: str
    """What it is, for the page of the process and for docs/metrics.md."""
    unit: str
    """Of the value, or of what a counter counts."""
    formula: str
    """How it is computed: the moment, the figures, the function."""
    remedy: str
    """What to do when it looks wrong."""
    labels: tuple[Label, ...]
    buckets: tuple[float, ...]
    """Upper bounds; empty unless it is a histogram."""

    @property
    def is_info(self) -> bool:
        """Whether it is 1 and its labels are what it says: alone these may name versions."""
        return self.name.endswith("_info")


class Group:
    """Metrics that are explained together."""

    def __init__(self, title: str, note: str) -> None:
        """``note`` is what all of them need to be understood."""
        self.title = title
        self.note = note
        self.metrics: list[Metric] = []

    def counter(
        self,
        name: str,
        help: str,  # noqa: A002
        *,
        unit: str,
        formula: str,
        remedy: str,
        labels: Sequence[Label] = (),
    ) -> Counter:
        """A count that only rises; ``name`` ends with _total."""
        noted = self._note(Metric(name, "counter", help, unit, formula, remedy, tuple(labels), ()))
        return Counter(name, help, _names(noted))

    def gauge(
        self,
        name: str,
        help: str,  # noqa: A002
        *,
        unit: str,
        formula: str,
        remedy: str,
        labels: Sequence[Label] = (),
    ) -> Gauge:
        """A value of now."""
        noted = self._note(Metric(name, "gauge", help, unit, formula, remedy, tuple(labels), ()))
        return Gauge(name, help, _names(noted))

    def histogram(
        self,
        name: str,
        help: str,  # noqa: A002
        *,
        unit: str,
        buckets: Sequence[float],
        formula: str,
        remedy: str,
        labels: Sequence[Label] = (),
    ) -> Histogram:
        """A distribution."""
        bounds = tuple(buckets)
        noted = self._note(
            Metric(name, "histogram", help, unit, formula, remedy, tuple(labels), bounds)
        )
        return Histogram(name, help, _names(noted), buckets=bounds)

    def _note(self, metric: Metric) -> Metric:
        self.metrics.append(metric)
        return metric


def _names(metric: Metric) -> list[str]:
    return [label.name for label in metric.labels]
