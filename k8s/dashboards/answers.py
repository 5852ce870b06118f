"""What a Prometheus says to the targets of a panel: curves, numbers, buckets, rows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from k8s.dashboards.prometheus_api import PrometheusApi
from k8s.dashboards.saved import fill_in


@dataclass(frozen=True)
class Asking:
    """Whom to ask, for which time and which pods."""

    prometheus: PrometheusApi
    namespace: str
    start_s: float
    """Unix time."""
    end_s: float
    scrape_interval_s: float
    num_points: int = 300
    """Points of a curve."""

    @property
    def step_s(self) -> float:
        """Seconds between two points of a curve, never less than between two scrapes."""
        return max((self.end_s - self.start_s) / self.num_points, self.scrape_interval_s)

    @property
    def times(self) -> np.ndarray:
        """Unix times of the points."""
        return self.start_s + self.step_s * np.arange(
            math.floor((self.end_s - self.start_s) / self.step_s) + 1
        )

    def fill_in(self, expression: str) -> str:
        """With Grafana's $__rate_interval: a scrape more than a step, and at least four scrapes."""
        interval_s = self.scrape_interval_s
        return fill_in(
            expression,
            rate_interval_s=max(self.step_s + interval_s, 4 * interval_s),
            namespace=self.namespace,
        )


@dataclass(frozen=True, eq=False)
class Curve:
    """One line: NaN where there is no value."""

    name: str
    labels: dict[str, str]
    values: np.ndarray
    """At ``Asking.times``."""


def curves(asking: Asking, targets: Sequence[dict[str, Any]]) -> list[Curve]:
    """The lines of a panel that have a value."""
    found = []
    for target in targets:
        expression = asking.fill_in(target["expr"])
        times = (asking.start_s, asking.end_s, asking.step_s)
        for series in asking.prometheus.query_range(expression, *times):
            values = np.full(len(asking.times), np.nan)
            for moment, text in series["values"]:
                index = round((float(moment) - asking.start_s) / asking.step_s)
                number = float(text)
                values[index] = number if math.isfinite(number) else np.nan
            if np.isfinite(values).any():
                name = legend(target["legendFormat"], series["metric"])
                found.append(Curve(name, series["metric"], values))
    return sorted(found, key=lambda curve: curve.name) if len(targets) == 1 else found


def numbers(asking: Asking, targets: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """(name, value at the end) of each series."""
    return [
        (legend(target["legendFormat"], series["metric"]), float(series["value"][1]))
        for target in targets
        for series in asking.prometheus.query(asking.fill_in(target["expr"]), asking.end_s)
    ]


def rows(asking: Asking, panel: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a table, as its transformation orders them."""
    [transformation] = panel["transformations"]
    options = transformation["options"]
    labels = sorted(options["renameByName"], key=options["indexByName"].__getitem__)
    [target] = panel["targets"]
    result = asking.prometheus.query(asking.fill_in(target["expr"]), asking.end_s)
    cells = sorted([series["metric"].get(label, "") for label in labels] for series in result)
    return [options["renameByName"][label] for label in labels], cells


def buckets(found: Sequence[Curve]) -> tuple[list[float], np.ndarray]:
    """Upper bounds of a histogram's buckets, and what fell into each (bounds, times).

    The curves are cumulative and have the label le.
    """
    ordered = sorted(found, key=lambda curve: float(curve.labels["le"]))
    cumulative = np.array([curve.values for curve in ordered])
    return (
        [float(curve.labels["le"]) for curve in ordered],
        np.diff(cumulative, axis=0, prepend=np.zeros((1, cumulative.shape[1]))),
    )


def legend(form: str, labels: dict[str, str]) -> str:
    """A legend with the series' labels in the place of {{label}}."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), form).strip()
