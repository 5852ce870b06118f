"""Dashboards: what the repository holds is what the script writes, on series that exist.

test_dashboard_rules.py holds them to the rules of Grafana's linter, and
tests/e2e/test_dashboards_live.py asks a real Prometheus.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from k8s.dashboards.build import FOLDER, dashboards
from k8s.dashboards.panels import BUDGET, FAILED
from k8s.dashboards.saved import NAMES, dashboard, expressions, fill_in, panels
from tests.k8s.chart import CHART, of_kind, render
from tests.k8s.promql import exported, matchers_in, names_in

pytestmark = pytest.mark.k8s


def test_dashboards_are_what_the_script_writes() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES) == set(dashboards())
    for name, text in dashboards().items():
        assert (FOLDER / f"{name}.json").read_text() == text, "stale: run `make dashboards`"


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_is_complete(name: str) -> None:
    content = dashboard(name)
    assert content["uid"] == f"kleash-{name}"
    variables = [one["name"] for one in content["templating"]["list"]]
    assert variables == ["datasource", "namespace", "job", "instance"]
    identifiers = [panel["id"] for panel in content["panels"]]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize("name", NAMES)
def test_titles_are_distinct(name: str) -> None:
    titles = [panel["title"] for panel in panels(dashboard(name))]
    assert len(titles) == len(set(titles)) >= 15


@pytest.mark.parametrize("name", NAMES)
def test_panels_do_not_overlap(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard(name)["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


@pytest.mark.parametrize("name", NAMES)
def test_expressions_ask_for_what_is_exported(name: str) -> None:
    """No recorded series: a dashboard works where the chart's rules are not installed."""
    of_targets = {"namespace", "job", "instance"}
    for title, expression in expressions(dashboard(name)):
        read = names_in(expression)
        assert read, title
        assert read <= set(exported()), title
        for series, labels in matchers_in(expression):
            assert of_targets <= labels <= exported()[series] | of_targets, f"{title}: {series}"


@pytest.mark.parametrize("name", NAMES)
def test_quantiles_are_over_all_replicas(name: str) -> None:
    for title, expression in expressions(dashboard(name)):
        if "histogram_quantile" in expression:
            assert re.search(r"sum by \((\w+, )*le\) \(rate\(", expression), title


def test_the_chart_installs_them_for_the_sidecar(helm: Path) -> None:
    items = render(settings=("metrics.dashboards.enabled=true",))
    installed = {
        key: (item, text)
        for item in of_kind(items, "ConfigMap")
        for key, text in item.get("data", {}).items()
        if item["metadata"]["labels"].get("grafana_dashboard") == "1"
    }
    assert set(installed) == {f"{name}.json" for name in NAMES}
    for name in NAMES:
        assert json.loads(installed[f"{name}.json"][1]) == dashboard(name)


def test_the_budget_of_the_alerts_is_the_dashboards() -> None:
    budget = "metrics.prometheusRule.thresholds.errorBudget=0.001"
    items = render(settings=("metrics.dashboards.enabled=true", budget))
    [text] = [
        item["data"]["reward-slo.json"]
        for item in of_kind(items, "ConfigMap")
        if "reward-slo.json" in item.get("data", {})
    ]
    asked = [each for _, each in expressions(json.loads(text))]
    before = [each for _, each in expressions(dashboard("reward-slo"))]
    assert asked == [each.replace(f"/ {BUDGET}", "/ 0.001") for each in before] != before


def test_failed_calls_are_those_of_the_alerts() -> None:
    """A budget that the dashboard shows as used must be one that the alerts count, too."""
    rules = (CHART / "files" / "rules" / "slo.yaml").read_text()
    codes = set(re.findall(r'grpc_code=~"[^"]+"', rules))
    assert codes == {FAILED}
    objective = [each for title, each in expressions(dashboard("reward-slo")) if "Burn" in title]
    assert len(objective) == 2
    assert all(FAILED in each and f"/ {BUDGET}" in each for each in objective)
    assert f"* {BUDGET}" in rules


def test_numbers_are_asked_for_once() -> None:
    """Over 30 days, a curve would ask Prometheus for the whole month at each of its points."""
    for name in NAMES:
        for panel in panels(dashboard(name)):
            for target in panel["targets"]:
                is_number = panel["type"] in ("stat", "table")
                assert target["instant"] is is_number, panel["title"]
                assert "[30d]" not in target["expr"] or is_number, panel["title"]


def test_a_variable_without_a_value_is_refused() -> None:
    filled = fill_in('rate(a{job=~"$job"}[$__rate_interval])', rate_interval_s=8, namespace="rlhf")
    assert filled == 'rate(a{job=~".+"}[8s])'
    with pytest.raises(ValueError, match="variable"):
        fill_in("rate(a[$__interval])", rate_interval_s=8, namespace="rlhf")


def test_latencies_lead_to_traces() -> None:
    """The histograms of calls have the traces' ids as exemplars."""
    asked = [
        (target["expr"], target.get("exemplar", False))
        for name in NAMES
        for panel in panels(dashboard(name))
        for target in panel["targets"]
    ]
    assert all(has == ("_handling_seconds_bucket" in expression) for expression, has in asked)
    assert sum(has for _, has in asked) == 4
