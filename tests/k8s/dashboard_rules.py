"""The 17 rules of Grafana's dashboard-linter, by its names, for dashboards that ask Prometheus.

https://github.com/grafana/dashboard-linter/blob/main/docs/index.md. A rule takes a dashboard and
says what is wrong with it. promtool parses, and regular expressions stand in for the walk through
the parsed expression. They are stricter: no selector may be without braces, and every kind of panel
is looked at, not those of the linter's list alone.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from k8s.dashboards.saved import expressions, fill_in, panels
from tests.k8s.promql import names_in
from tests.k8s.tools import need, run

Dashboard = dict[str, Any]
Rule = Callable[[Dashboard], Iterator[str]]

SOURCE = "${datasource}"
UNITS = {"none", "short", "percentunit", "s", "bytes", "Bps", "reqps", "ops"}
"""Of Grafana's units, those in use here."""
SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}")
RANGE = re.compile(r"(\w+)\(\s*[a-zA-Z_:][\w:]*\{[^}]*\}\[([^\]]+)\]")
"""(function, range) of each range vector."""
ANY_RANGE = re.compile(r"\[([^\]]+)\]")
LABEL_VALUES = re.compile(r"^label_values\((.+), (\w+)\)$")
QUOTED = re.compile(r'"[^"]*"')


def variable(dashboard: Dashboard, name: str) -> dict[str, Any]:
    """A variable of the dashboard; empty when it has none of the name."""
    found = [one for one in dashboard["templating"]["list"] if one["name"] == name]
    return found[0] if found else {}


def queries(dashboard: Dashboard) -> Iterator[dict[str, Any]]:
    """The variables that are looked up."""
    for one in dashboard["templating"]["list"]:
        if one["type"] == "query":
            yield one


def template_datasource(dashboard: Dashboard) -> Iterator[str]:
    """One data source to choose, of Prometheus, with the usual name and label."""
    sources = [one for one in dashboard["templating"]["list"] if one["type"] == "datasource"]
    described = [(one["name"], one["label"], one["query"]) for one in sources]
    if described != [("datasource", "Data source", "prometheus")]:
        yield f"data sources are {described}"


def template_job(dashboard: Dashboard) -> Iterator[str]:
    """$job is looked up, may be several, and its All is any job."""
    yield from _template(dashboard, "job")


def template_instance(dashboard: Dashboard) -> Iterator[str]:
    """$instance likewise."""
    yield from _template(dashboard, "instance")


def _template(dashboard: Dashboard, name: str) -> Iterator[str]:
    wanted = {"type": "query", "label": name.capitalize(), "multi": True, "allValue": ".+"}
    found = variable(dashboard, name)
    for key, value in wanted.items():
        if found.get(key) != value:
            yield f"${name} has {key} {found.get(key)} and not {value}"
    if found.get("datasource", {}).get("uid") != SOURCE:
        yield f"${name} is looked up in {found.get('datasource')}"


def template_label_promql(dashboard: Dashboard) -> Iterator[str]:
    """Variables are label_values of a selector."""
    for one in queries(dashboard):
        match = LABEL_VALUES.match(one["query"]["query"])
        if not match:
            yield f"${one['name']} is {one['query']['query']}"
        else:
            yield from refused([(f"${one['name']}", match[1])])


def template_on_time_change_reload(dashboard: Dashboard) -> Iterator[str]:
    """Variables are looked up again when the time range changes."""
    for one in queries(dashboard):
        if one["refresh"] != 2:
            yield f"${one['name']} has refresh {one['refresh']}"


def panel_datasource(dashboard: Dashboard) -> Iterator[str]:
    """Panels, and their targets, ask the data source that was chosen."""
    for panel in panels(dashboard):
        for asked in (panel, *panel.get("targets", ())):
            if asked.get("datasource", {}).get("uid") != SOURCE:
                yield f"{panel['title']} asks {asked.get('datasource')}"


def panel_title_description(dashboard: Dashboard) -> Iterator[str]:
    """Panels say what they show."""
    for panel in panels(dashboard):
        if not panel.get("title") or len(panel.get("description", "")) < 10:
            yield f"panel {panel['id']}: {panel.get('title')}: {panel.get('description')}"


def panel_units(dashboard: Dashboard) -> Iterator[str]:
    """Panels have a unit that Grafana knows."""
    for panel in panels(dashboard):
        unit = panel["fieldConfig"]["defaults"].get("unit")
        if unit not in UNITS:
            yield f"{panel['title']} has the unit {unit}"


def panel_no_targets(dashboard: Dashboard) -> Iterator[str]:
    """Panels ask something."""
    for panel in panels(dashboard):
        if not panel.get("targets"):
            yield f"{panel['title']} asks nothing"


def target_logql(dashboard: Dashboard) -> Iterator[str]:
    """LogQL would have to be valid: nothing asks Loki."""
    for panel in panels(dashboard):
        for target in panel.get("targets", ()):
            if target["datasource"]["type"] != "prometheus":
                yield f"{panel['title']} asks {target['datasource']['type']}"


def target_logql_auto(dashboard: Dashboard) -> Iterator[str]:
    """$__auto is Loki's range; Prometheus does not know it."""
    for title, expression in expressions(dashboard):
        if "$__auto" in expression:
            yield f"{title}: {expression}"


def target_promql(dashboard: Dashboard) -> Iterator[str]:
    """Expressions are PromQL."""
    yield from refused(list(expressions(dashboard)))


def target_rate_interval(dashboard: Dashboard) -> Iterator[str]:
    """Rates are over $__rate_interval; increase and others may be over a time of their own."""
    for title, expression in expressions(dashboard):
        ranges = RANGE.findall(expression)
        if len(ranges) != len(ANY_RANGE.findall(QUOTED.sub("", expression))):
            yield f"{title} has a range that no function takes: {expression}"
        for function, window in ranges:
            if function in ("rate", "irate") and window != "$__rate_interval":
                yield f"{title}: {function} over {window}"


def target_job(dashboard: Dashboard) -> Iterator[str]:
    """Every selector keeps to $job."""
    yield from _matcher(dashboard, "job")


def target_instance(dashboard: Dashboard) -> Iterator[str]:
    """Every selector keeps to $instance."""
    yield from _matcher(dashboard, "instance")


def _matcher(dashboard: Dashboard, name: str) -> Iterator[str]:
    for title, expression in expressions(dashboard):
        for series, matchers in SELECTOR.findall(expression):
            if f'{name}=~"${name}"' not in matchers:
                yield f"{title}: {series} is of any {name}"
        for series in names_in(expression):
            if re.search(rf"\b{series}\b(?!\{{)", QUOTED.sub("", expression)):
                yield f"{title}: {series} is without matchers"


def refused(asked: list[tuple[str, str]]) -> Iterator[str]:
    """What promtool says about expressions, each with where it stands."""
    rules = [
        {
            "record": f"expression:{number}",
            "expr": fill_in(expression, rate_interval_s=60, namespace="rlhf"),
        }
        for number, (_, expression) in enumerate(asked)
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}, file)
        file.flush()
        done = run(need("promtool"), "check", "rules", file.name)
    if done.returncode:
        yield f"of {', '.join(title for title, _ in asked)}: {done.stdout}{done.stderr}"


def target_counter_agg(dashboard: Dashboard) -> Iterator[str]:
    """Counters are asked for their rate or increase."""
    for title, expression in expressions(dashboard):
        for match in SELECTOR.finditer(expression):
            series, before = match[1], expression[: match.start()]
            is_counter = re.search(r"_(total|bucket|sum|count)$", series)
            if is_counter and not re.search(r"\b(rate|irate|increase)\($", before):
                yield f"{title}: {series} grows for ever"


def uneditable(dashboard: Dashboard) -> Iterator[str]:
    """It cannot be changed in Grafana, where the next release would undo the change."""
    if dashboard["editable"]:
        yield "it is editable"


RULES: dict[str, Rule] = {
    "template-datasource-rule": template_datasource,
    "template-job-rule": template_job,
    "template-instance-rule": template_instance,
    "template-label-promql-rule": template_label_promql,
    "template-on-time-change-reload-rule": template_on_time_change_reload,
    "panel-datasource-rule": panel_datasource,
    "panel-title-description-rule": panel_title_description,
    "panel-units-rule": panel_units,
    "panel-no-targets-rule": panel_no_targets,
    "target-logql-rule": target_logql,
    "target-logql-auto-rule": target_logql_auto,
    "target-promql-rule": target_promql,
    "target-rate-interval-rule": target_rate_interval,
    "target-job-rule": target_job,
    "target-instance-rule": target_instance,
    "target-counter-agg-rule": target_counter_agg,
    "uneditable-dashboard": uneditable,
}
