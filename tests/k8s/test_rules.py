"""Alert rules: valid, on metrics that exist, each with a case that fires and a silent one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.k8s.chart import CHART, StrictLoader, of_kind, pods, render, selects
from tests.k8s.promql import exported, matchers_in, names_in
from tests.k8s.tools import ROOT, need, run

pytestmark = pytest.mark.k8s

FILES = tuple(sorted((CHART / "files" / "rules").glob("*.yaml")))
TESTS = ROOT / "tests" / "k8s" / "rules"
OF_TARGETS = {"namespace", "job", "instance"}
MONITORS = (
    "metrics.serviceMonitor.enabled=true",
    "metrics.podMonitor.enabled=true",
    "metrics.prometheusRule.enabled=true",
)


def groups(path: Path) -> list[dict[str, Any]]:
    return yaml.load(path.read_text(), StrictLoader)["groups"]


def rules(path: Path) -> Iterator[dict[str, Any]]:
    for group in groups(path):
        yield from group["rules"]


def alerts(path: Path) -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules(path) if "alert" in rule}


def test_there_are_three_files_and_no_name_is_used_twice() -> None:
    assert [path.stem for path in FILES] == ["services", "slo", "training"]
    names = [name for path in FILES for name in alerts(path)]
    assert len(names) == len(set(names)) >= 18


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rules_are_valid(path: Path) -> None:
    done = run(need("promtool"), "check", "rules", "--lint-fatal", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(path: Path) -> None:
    done = run(need("promtool"), "test", "rules", str(TESTS / f"{path.stem}_test.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_alert_has_a_firing_and_a_silent_case(path: Path) -> None:
    content = yaml.load((TESTS / f"{path.stem}_test.yaml").read_text(), StrictLoader)
    cases = [case for test in content["tests"] for case in test["alert_rule_test"]]
    firing = {case["alertname"] for case in cases if case["exp_alerts"]}
    silent = {case["alertname"] for case in cases if not case["exp_alerts"]}
    assert firing == silent == set(alerts(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rules_read_what_is_exported(path: Path) -> None:
    recorded = {rule["record"] for each in FILES for rule in rules(each) if "record" in rule}
    for rule in rules(path):
        name = rule.get("alert") or rule["record"]
        read = names_in(rule["expr"])
        assert read, name
        assert read <= set(exported()) | recorded, name
        for series, labels in matchers_in(rule["expr"]):
            if series in exported():
                assert labels <= exported()[series] | OF_TARGETS, f"{name}: {series}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_alerts_tell_the_reader_what_to_do(path: Path) -> None:
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
        for line in (ROOT / "docs" / "operations.md").read_text().splitlines()
        if line.startswith("#")
    }
    for name, rule in alerts(path).items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        annotations = rule["annotations"]
        assert set(annotations) == {"summary", "description", "runbook_url"}, name
        assert annotations["summary"].endswith("."), name
        assert "{{" not in annotations["summary"], f"{name}: a summary is the same for all targets"
        assert "{{ $labels.namespace }}" in annotations["description"], name
        document, _, anchor = annotations["runbook_url"].rpartition("#")
        assert document.endswith("docs/operations.md"), name
        assert anchor == name.lower(), name
        assert anchor in headings, f"docs/operations.md has no heading {name}"


def test_the_chart_installs_the_rules_as_they_are(helm: Path) -> None:
    installed = of_kind(render(settings=MONITORS), "PrometheusRule")
    found = [group for item in installed for group in item["spec"]["groups"]]
    expected = [group for path in FILES for group in groups(path)]
    assert sorted(found, key=itemgetter("name")) == sorted(expected, key=itemgetter("name"))


def test_every_server_is_scraped_once_and_keeps_its_labels(helm: Path) -> None:
    """The operator's own label `service` would replace the one that the rules read."""
    items = render(settings=MONITORS)
    scraped: dict[str, int] = {}
    services = of_kind(items, "Service")
    for monitor in of_kind(items, "ServiceMonitor", "PodMonitor"):
        spec = monitor["spec"]
        endpoints = spec.get("endpoints") or spec.get("podMetricsEndpoints")
        for endpoint in endpoints:
            assert endpoint["port"] == "http-metrics"
            assert endpoint["honorLabels"] is True
        if monitor["kind"] == "PodMonitor":
            chosen = [pod for pod in pods(items) if selects(spec["selector"], pod.labels)]
        else:
            chosen = [
                pod
                for service in services
                if selects(spec["selector"], service["metadata"]["labels"])
                and "http-metrics" in {port["name"] for port in service["spec"]["ports"]}
                for pod in pods(items)
                if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
            ]
        for pod in chosen:
            if not pod.is_test and "http-metrics" in pod.ports():
                scraped[pod.component] = scraped.get(pod.component, 0) + 1
    assert scraped == {"policy": 1, "reward": 1, "reference": 1, "trainer": 1}
