"""The chart's Grafana dashboards, built in Python: `make dashboards` puts them into the chart.

    python -m k8s.dashboards.build

A dashboard has the variables $datasource, $namespace, $job and $instance. content.py holds what
they show.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, QueryVariable
from grafana_foundation_sdk.builders.dashboard import Row as RowBuilder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    GraphGradientMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from k8s.dashboards.content import REWARD_SLO, SERVICES, TRAINING, Panel, Row

FOLDER = Path(__file__).parents[1] / "chart" / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
PANEL_HEIGHT = 8


def dashboards() -> dict[str, str]:
    """JSON of each dashboard by its name."""
    reward_jobs = 'kleash_model_loaded{namespace="$namespace", service="reward"}'
    all_jobs = 'kleash_model_loaded{namespace="$namespace"}'
    trainer_jobs = 'kleash_model_loaded{namespace="$namespace", service="trainer"}'
    return {
        "reward-slo": _dashboard("reward-slo", "Kleash / Reward", reward_jobs, REWARD_SLO),
        "services": _dashboard("services", "Kleash / Services", all_jobs, SERVICES),
        "training": _dashboard("training", "Kleash / Training", trainer_jobs, TRAINING),
    }


def _dashboard(name: str, title: str, jobs: str, rows: tuple[Row, ...]) -> str:
    builder = (
        Dashboard(title)
        .uid(f"kleash-{name}")
        .tags(["kleash"])
        .readonly()
        .time("now-1h", "now")
        .timezone("browser")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(
            DatasourceVariable("datasource")
            .label("Data source")
            .type("prometheus")
            .current(VariableOption(text="default", value="default"))
        )
        .with_variable(_variable("namespace", "Namespace", "kleash_model_loaded", multi=False))
        .with_variable(_variable("job", "Job", jobs))
        .with_variable(_variable("instance", "Instance", 'up{namespace="$namespace", job=~"$job"}'))
    )
    numbers = count(1)
    for row in rows:
        builder.with_row(RowBuilder(row.title).id(next(numbers)))
        for panel in row.panels:
            builder.with_panel(_panel(panel).id(next(numbers)))
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _variable(name: str, label: str, series: str, *, multi: bool = True) -> QueryVariable:
    query = f"label_values({series}, {name})"
    variable = (
        QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )
    if multi:
        everything = VariableOption(selected=True, text="All", value="$__all")
        variable.multi(True).include_all(True).all_value(".+").current(everything)
    return variable


def _panel(panel: Panel) -> timeseries.Panel | stat.Panel | heatmap.Panel:
    builder: timeseries.Panel | stat.Panel | heatmap.Panel
    if panel.kind == "number":
        builder = stat.Panel()
    elif panel.kind == "heatmap":
        colors = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues")
        builder = heatmap.Panel().calculate(False).color(colors)
    else:
        legend = common.VizLegendOptions().show_legend(True)
        legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
        tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
        builder = timeseries.Panel().legend(legend).tooltip(tooltip).fill_opacity(10)
        builder.gradient_mode(GraphGradientMode.NONE)
        if panel.kind == "stack":
            builder.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(60)
    builder.title(panel.title).description(panel.description).unit(panel.unit)
    builder.datasource(SOURCE).height(PANEL_HEIGHT).span(panel.span)
    for number, (legend_format, expression) in enumerate(panel.targets):
        query = prometheus.Dataquery().expr(expression).legend_format(legend_format)
        query.range().ref_id(chr(ord("A") + number)).datasource(SOURCE)
        if panel.kind == "heatmap":
            query.format(PromQueryFormat.HEATMAP)
        builder.with_target(query)
    return builder


def main() -> None:
    """The command."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in dashboards().items():
        (FOLDER / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
