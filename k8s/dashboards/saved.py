"""The dashboards as they lie in the chart, with values in the place of Grafana's variables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from k8s.dashboards.build import FOLDER

NAMES = ("reward-slo", "services", "training")


def dashboard(name: str) -> dict[str, Any]:
    """One of NAMES."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def panels(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The panels of a dashboard without the headings of rows."""
    for panel in content["panels"]:
        if panel["type"] != "row":
            yield panel


def expressions(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(title of the panel, expression) of every target."""
    for panel in panels(content):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def fill_in(
    expression: str,
    *,
    rate_interval_s: float,
    namespace: str,
    job: str = ".+",
    instance: str = ".+",
) -> str:
    """An expression as Grafana asks it; the defaults are its "All".

    ``rate_interval_s`` is $__rate_interval: four scrape intervals, or the time between two points
    when that is longer.
    """
    values = {
        "$__rate_interval": f"{round(rate_interval_s)}s",
        "$namespace": namespace,
        "$job": job,
        "$instance": instance,
    }
    for variable, value in values.items():
        expression = expression.replace(variable, value)
    if "$" in expression:
        raise ValueError(f"{expression} has a variable that is not among {', '.join(values)}")
    return expression
