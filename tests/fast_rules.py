"""The rules that the chart installs, on a clock that is faster by a factor: minutes become seconds.

Every duration of a rule is divided by the factor: ``for``, ranges in brackets, and offsets. The
rest of the expressions stays as it is, but for thresholds that say how long something may be
silent, which the caller sets through the chart's values (``silences``). How long a call may take,
or a model may load, depends on the machine and not on the clock: those stay.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from tests.k8s.chart import of_kind, render

SILENCES_S = {"silentBatcherSeconds": 180, "stalledSeconds": 300}
"""Values of the chart that are silences, and their defaults, in seconds."""

_UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = r"(?:\d+(?:ms|[smhd]))+"
_IN_EXPRESSION = re.compile(rf"(?P<before>(?<=[\w}}])\[|\boffset\s+)(?P<duration>{_DURATION})\b")


def installed_rules(factor: float = 1) -> list[dict[str, Any]]:
    """Groups of the PrometheusRule of the release ``demo`` in the namespace ``rlhf``."""
    settings = ["metrics.prometheusRule.enabled=true"]
    for name, seconds in SILENCES_S.items():
        settings.append(f"metrics.prometheusRule.thresholds.{name}={seconds / factor:g}")
    (rule,) = of_kind(render(settings=settings), "PrometheusRule")
    return [faster(group, factor) for group in rule["spec"]["groups"]]


def faster(group: dict[str, Any], factor: float) -> dict[str, Any]:
    """A copy of a group of rules whose durations are divided by ``factor``.

    It is evaluated as often as the Prometheus that reads it says.
    """
    group = copy.deepcopy(group)
    group.pop("interval", None)
    for rule in group["rules"]:
        rule["expr"] = _IN_EXPRESSION.sub(
            lambda found: found["before"] + _divided(found["duration"], factor), rule["expr"]
        )
        if "for" in rule:
            rule["for"] = _divided(rule["for"], factor)
    return group


def _divided(duration: str, factor: float) -> str:
    """``5m`` by 30 is ``10000ms``."""
    parts = re.findall(r"(\d+)(ms|[smhd])", duration)
    seconds = sum(int(number) * _UNITS_S[unit] for number, unit in parts)
    return f"{round(seconds * 1000 / factor)}ms"
