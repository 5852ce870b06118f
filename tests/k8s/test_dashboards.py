"""Dashboards: what the repository holds is what the script writes, on series that exist, by the
rules of Grafana's dashboard-linter (https://github.com/grafana/dashboard-linter)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s.dashboards.build import FOLDER, dashboards
from tests.k8s.chart import CHART, of_kind, render
from tests.k8s.promql import exported, matchers_in, names_in
from tests.k8s.tools import need, run

pytestmark = pytest.mark.k8s

NAMES = ("reward-slo", "services", "training")
RECORDED = "kleash:"
VARIABLES = {
    "$namespace": "rlhf",
    "$job": "demo-kleash-reward",
    "$instance": "10.0.0.1:9090",
    "$__rate_interval": "5m",
}


def dashboard(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def panels(name: str) -> Iterator[dict[str, Any]]:
    for panel in dashboard(name)["panels"]:
        if panel["type"] != "row":
            yield panel


def expressions(name: str) -> Iterator[tuple[str, str]]:
    """(title of the panel, expression)."""
    for panel in panels(name):
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def test_dashboards_are_what_the_script_writes() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES) == set(dashboards())
    for name, text in dashboards().items():
        assert (FOLDER / f"{name}.json").read_text() == text, "stale: run `make dashboards`"


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_is_complete(name: str) -> None:
    content = dashboard(name)
    assert content["editable"] is False
    assert content["uid"] == f"kleash-{name}"
    variables = {one["name"]: one for one in content["templating"]["list"]}
    assert list(variables) == ["datasource", "namespace", "job", "instance"]
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for key in ("job", "instance"):
        assert variables[key]["multi"] is True
        assert variables[key]["includeAll"] is True
        assert variables[key]["allValue"] == ".+"
    for key in ("namespace", "job", "instance"):
        assert variables[key]["label"] == key.capitalize()
        assert variables[key]["datasource"]["uid"] == "${datasource}"
        assert variables[key]["refresh"] == 2, "looked up again when the time range changes"
    identifiers = [panel["id"] for panel in content["panels"]]
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.parametrize("name", NAMES)
def test_panels_explain_themselves(name: str) -> None:
    titles = [panel["title"] for panel in panels(name)]
    assert len(titles) == len(set(titles)) >= 9
    for panel in panels(name):
        assert panel["title"], name
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]


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
    recorded = {
        rule["record"]
        for path in (CHART / "files" / "rules").glob("*.yaml")
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    for title, expression in expressions(name):
        read = names_in(expression)
        assert read, title
        assert read <= set(exported()) | recorded, title
        for series, labels in matchers_in(expression):
            if series.startswith(RECORDED):
                assert {"namespace", "job"} <= labels, title
                continue
            assert {"namespace", "job", "instance"} <= labels, f"{title}: {series}"
            assert labels <= exported()[series] | {"namespace", "job", "instance"}, title
        selectors = len(re.findall(r"\{", expression))
        assert selectors == len(matchers_in(expression)) >= len(read), f"{title}: bare series"


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_over_the_interval_that_fits_the_scrape(name: str) -> None:
    for title, expression in expressions(name):
        for window in re.findall(r"\[([^\]]+)\]", re.sub(r'"[^"]*"', "", expression)):
            assert window == "$__rate_interval", title
        for series in names_in(expression):
            is_counter = re.search(r"_(total|bucket|sum|count)$", series)
            assert not is_counter or f"rate({series}" in expression, f"{title}: {series}"


@pytest.mark.parametrize("name", NAMES)
def test_quantiles_are_over_all_replicas(name: str) -> None:
    for title, expression in expressions(name):
        if "histogram_quantile" in expression:
            assert re.search(r"sum by \((\w+, )*le\) \(rate\(", expression), title


@pytest.mark.parametrize("name", NAMES)
def test_expressions_parse(name: str, tmp_path: Path) -> None:
    """Prometheus's own parser, with values for the variables."""
    rules: list[dict[str, str]] = []
    for number, (_, expression) in enumerate(expressions(name)):
        for variable, value in VARIABLES.items():
            expression = expression.replace(variable, value)
        assert "$" not in expression
        rules.append({"record": f"panel:expression:{number}", "expr": expression})
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = run(need("promtool"), "check", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


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
