"""The rules of Grafana's dashboard-linter: no dashboard breaks one, and each sees a breach."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from k8s.dashboards.saved import NAMES, dashboard, panels
from tests.k8s.dashboard_rules import RULES, Dashboard, variable

pytestmark = pytest.mark.k8s


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: str, name: str) -> None:
    assert list(RULES[rule](dashboard(name))) == []


def first(content: Dashboard) -> dict[str, Any]:
    """A panel."""
    return next(iter(panels(content)))


def ask(expression: str) -> Callable[[Dashboard], object]:
    """What makes a panel ask something else."""
    return lambda content: first(content)["targets"][0].update(expr=expression)


PODS = 'job=~"$job", instance=~"$instance"'
BREACHES: dict[str, Callable[[Dashboard], object]] = {
    "template-datasource-rule": lambda it: variable(it, "datasource").update(query="loki"),
    "template-job-rule": lambda it: variable(it, "job").update(multi=False),
    "template-instance-rule": lambda it: variable(it, "instance").update(allValue=".*"),
    "template-label-promql-rule": lambda it: variable(it, "job").update(
        query={"query": "label_values(up{, job)"}
    ),
    "template-on-time-change-reload-rule": lambda it: variable(it, "job").update(refresh=1),
    "panel-datasource-rule": lambda it: first(it).update(datasource={"uid": "prometheus"}),
    "panel-title-description-rule": lambda it: first(it).update(description=""),
    "panel-units-rule": lambda it: first(it)["fieldConfig"]["defaults"].update(unit="seconds"),
    "panel-no-targets-rule": lambda it: first(it).update(targets=[]),
    "target-logql-rule": lambda it: first(it)["targets"][0]["datasource"].update(type="loki"),
    "target-logql-auto-rule": ask(f"rate(a_total{{{PODS}}}[$__auto])"),
    "target-promql-rule": ask(f"sum by (job) (rate(a_total{{{PODS}}}[5m])"),
    "target-rate-interval-rule": ask(f"rate(a_total{{{PODS}}}[5m])"),
    "target-job-rule": ask('a{job="$job", instance=~"$instance"}'),
    "target-instance-rule": ask('a{job=~"$job"}'),
    "target-counter-agg-rule": ask(f"sum(a_total{{{PODS}}})"),
    "uneditable-dashboard": lambda it: it.update(editable=True),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_breach_is_seen(rule: str) -> None:
    content = copy.deepcopy(dashboard("training"))
    BREACHES[rule](content)
    assert list(RULES[rule](content))


def test_there_are_seventeen() -> None:
    assert len(RULES) == len(BREACHES) == 17


@pytest.mark.parametrize(
    "expression", ["a", f"a{{{PODS}}} + a", f"a{{{PODS}}} / on (job) b", f"max(b) - a{{{PODS}}}"]
)
def test_a_selector_without_matchers_is_seen(expression: str) -> None:
    content = copy.deepcopy(dashboard("training"))
    ask(expression)(content)
    assert list(RULES["target-job-rule"](content))
