"""Alert rules: valid, on metrics that exist, each with a case that fires and a silent one."""

from __future__ import annotations

import json
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
EVERY_RELEASE = 'app_kubernetes_io_part_of="kleash"'
"""What the files ask of a series; the chart puts its own release in this one's place."""
WITHOUT_A_FIGURE = {
    "KleashTargetDown",
    "KleashTargetsMissing",
    "KleashReplicaQuarantined",
    "KleashTrainingNonFinite",
}
"""Alerts whose value is always 0 or 1."""
OF_TARGETS = {"namespace", "job", "instance", "app_kubernetes_io_part_of"}
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
    assert len(names) == len(set(names)) >= 22


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
    for name, rule in alerts(path).items():
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        annotations = rule["annotations"]
        assert set(annotations) == {"summary", "description", "runbook_url"}, name
        assert annotations["summary"].endswith("."), name
        assert "{{" not in annotations["summary"], f"{name}: a summary is the same for all targets"
        assert "$labels.namespace " in annotations["description"], name
        assert ("$value" in annotations["description"]) is (name not in WITHOUT_A_FIGURE), name
        assert annotations["runbook_url"] == f"docs/runbooks/{name}.md"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_series_of_a_rule_is_of_kleash(path: Path) -> None:
    """One that is not would be of all releases in the rules of each, or of other programs."""
    for rule in rules(path):
        name = rule.get("alert") or rule["record"]
        bare = re.sub(r"\b(?:by|on) \([^)]*\)", "", rule["expr"])
        for series in names_in(rule["expr"]):
            for found in re.finditer(rf"(?<![\w:]){series}\b(\{{[^}}]*\}})?", bare):
                assert EVERY_RELEASE in (found[1] or ""), f"{name}: {series}"


def installed(*settings: str, release: str = "demo") -> list[dict[str, Any]]:
    """Groups of rules that a release installs in the namespace rlhf."""
    items = of_kind(render(settings=(*MONITORS, *settings), release=release), "PrometheusRule")
    return [group for item in items for group in item["spec"]["groups"]]


def test_the_chart_installs_the_rules_for_its_own_release(helm: Path) -> None:
    text = json.dumps([group for path in FILES for group in groups(path)])
    own = 'namespace="rlhf", app_kubernetes_io_instance="demo"'
    assert EVERY_RELEASE not in json.loads(text)[0]["name"]
    expected = json.loads(text.replace(json.dumps(EVERY_RELEASE)[1:-1], json.dumps(own)[1:-1]))
    assert sorted(installed(), key=itemgetter("name")) == sorted(expected, key=itemgetter("name"))
    assert EVERY_RELEASE not in json.dumps(installed()).replace("\\", "")


def expressions(*settings: str) -> str:
    return "\n".join(rule["expr"] for group in installed(*settings) for rule in group["rules"])


def test_every_threshold_has_the_default_of_the_files_and_its_value_takes_that_place(
    helm: Path,
) -> None:
    values = yaml.load((CHART / "values.yaml").read_text(), StrictLoader)
    thresholds = values["metrics"]["prometheusRule"]["thresholds"]
    text = "\n".join(rule["expr"] for path in FILES for rule in rules(path))
    named = re.findall(r"([0-9.]+)  # thresholds[.](\w+)\n", text)
    assert {name: float(number) for number, name in named} == thresholds
    assert text.count("thresholds") == len(named)
    key = "metrics.prometheusRule.thresholds"
    changed = expressions(*(f"{key}.{name}={0.125 + n / 100}" for n, name in enumerate(thresholds)))
    for n, name in enumerate(thresholds):
        found = re.findall(rf"(\S+)  # thresholds[.]{name}\n", changed)
        assert found == [str(0.125 + n / 100)] * len(found)
        assert len(found) == text.count(f"thresholds.{name}\n")


def test_a_threshold_of_a_million_is_a_number_of_promql(helm: Path, tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    large = installed("metrics.prometheusRule.thresholds.modelLoadSeconds=1000000")
    path.write_text(yaml.safe_dump({"groups": large}))
    done = run(need("promtool"), "check", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_runbooks_are_where_the_values_say(helm: Path) -> None:
    base = "https://git.example.org/kleash/docs/runbooks"
    for given in (base, f"{base}/"):
        for group in installed(f'metrics.prometheusRule.runbookBaseUrl="{given}"'):
            for rule in group["rules"]:
                if "alert" in rule:
                    assert rule["annotations"]["runbook_url"] == f"{base}/{rule['alert']}.md"


def test_a_release_that_nothing_reads_is_named(helm: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": installed()}))
    labels = {
        "namespace": "rlhf", "app_kubernetes_io_instance": "demo", "severity": "critical",
    }  # fmt: skip
    told = dict(alerts(CHART / "files" / "rules" / "services.yaml")["KleashTargetsMissing"])
    annotations = {
        **told["annotations"],
        "description": "No target of the release demo in rlhf has had the labels that the rules "
        "ask for in 15 minutes: no monitor finds the pods, or there are none.",
    }
    fires = {"exp_labels": labels, "exp_annotations": annotations}
    case = {
        "interval": "1m",
        "input_series": [{"series": 'up{namespace="rlhf", job="other"}', "values": "1x20"}],
        "alert_rule_test": [
            {"eval_time": "20m", "alertname": "KleashTargetsMissing", "exp_alerts": [fires]}
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(tmp_path / "rules.yaml")], "tests": [case]}))
    done = run(need("promtool"), "test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("job", ["one-reward", "kubernetes-pods"])
def test_rules_of_a_release_fire_for_it_and_no_other(helm: Path, tmp_path: Path, job: str) -> None:
    """Whatever its objects are called, and whether monitors or annotations have it scraped."""
    files: list[str] = []
    for release in ("one", "two"):
        named = installed(f'fullnameOverride="{release}"', release=release)
        for group in named:
            for rule in group["rules"]:
                if "alert" in rule:
                    rule["labels"]["rules_of"] = release
        path = tmp_path / f"{release}.yaml"
        path.write_text(yaml.safe_dump({"groups": named}))
        files.append(str(path))

    def series(release: str, namespace: str = "rlhf") -> str:
        labels = f'app_kubernetes_io_instance="{release}", app_kubernetes_io_part_of="kleash"'
        return f'up{{namespace="{namespace}", job="{job}", instance="{release}:9090", {labels}}}'

    expected = {
        "namespace": "rlhf",
        "job": job,
        "instance": "one:9090",
        "app_kubernetes_io_instance": "one",
        "app_kubernetes_io_part_of": "kleash",
        "severity": "critical",
        "rules_of": "one",
    }
    down = alerts(CHART / "files" / "rules" / "services.yaml")["KleashTargetDown"]["annotations"]
    told = dict(down)
    for label in ("instance", "job", "namespace"):
        told["description"] = told["description"].replace(
            f"{{{{ $labels.{label} }}}}", expected[label]
        )
    case = {
        "interval": "1m",
        "input_series": [
            {"series": series("one"), "values": "0x20"},
            {"series": series("two"), "values": "1x20"},
            {"series": series("one", namespace="elsewhere"), "values": "0x20"},
            {"series": 'up{namespace="rlhf", job="other", instance="a:1"}', "values": "0x20"},
        ],
        "alert_rule_test": [
            {
                "eval_time": "15m",
                "alertname": "KleashTargetDown",
                "exp_alerts": [{"exp_labels": expected, "exp_annotations": told}],
            }
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump({"rule_files": files, "tests": [case]}))
    done = run(need("promtool"), "test", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_targets_carry_the_labels_by_which_rules_know_them(helm: Path) -> None:
    """Prometheus writes dots, slashes and hyphens of a pod's label as underscores."""
    items = render(settings=MONITORS)
    asked = {"app_kubernetes_io_instance", "app_kubernetes_io_part_of"}
    for monitor in of_kind(items, "ServiceMonitor", "PodMonitor"):
        taken = {
            re.sub(r"[^A-Za-z0-9]", "_", label): label
            for label in monitor["spec"]["podTargetLabels"]
        }
        assert asked <= set(taken), monitor["kind"]
        for pod in pods(items):
            if not pod.is_test and "http-metrics" in pod.ports():
                assert pod.labels[taken["app_kubernetes_io_instance"]] == "demo"
                assert pod.labels[taken["app_kubernetes_io_part_of"]] == "kleash"


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
