"""The chart's Grafana dashboards, built in Python: `make dashboards` puts them into the chart.

    python -m k8s.dashboards.build

A dashboard has the variables $datasource, $namespace, $job and $instance. What each shows is in
reward_slo.py, services.py and training.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import (
    common,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.dashboard import Row as RowBuilder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    GraphGradientMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from k8s.dashboards.panels import Panel, Row
from k8s.dashboards.reward_slo import REWARD_SLO
from k8s.dashboards.services import SERVICES
from k8s.dashboards.training import TRAINING

FOLDER = Path(__file__).parents[1] / "chart" / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
PANEL_HEIGHT = 8


def dashboards() -> dict[str, str]:
    """JSON of each dashboard by its name."""
    reward_jobs = 'kleash_model_loaded{namespace="$namespace", service="reward"}'
    all_jobs = 'kleash_model_loaded{namespace="$namespace"}'
    # The policy's replicas show which weights they have.
    run_jobs = 'kleash_model_loaded{namespace="$namespace", service=~"trainer|policy"}'
    return {
        "reward-slo": _dashboard("reward-slo", "Kleash / Reward", reward_jobs, REWARD_SLO),
        "services": _dashboard("services", "Kleash / Services", all_jobs, SERVICES),
        "training": _dashboard("training", "Kleash / Training", run_jobs, TRAINING),
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


PanelBuilder = timeseries.Panel | stat.Panel | heatmap.Panel | table.Panel


def _panel(panel: Panel) -> PanelBuilder:
    builder = _BUILDERS[panel.kind](panel)
    builder.title(panel.title).description(panel.description).unit(panel.unit)
    builder.datasource(SOURCE).height(PANEL_HEIGHT).span(panel.span)
    if panel.decimals is not None:
        builder.decimals(panel.decimals)
    for number, (legend_format, expression) in enumerate(panel.targets):
        query = prometheus.Dataquery().expr(expression).legend_format(legend_format)
        query.ref_id(chr(ord("A") + number)).datasource(SOURCE)
        if panel.has_exemplars:
            query.exemplar(True)
        # A number is the newest one: over 30 days, a curve of them would be asked for dearly.
        if panel.kind in ("number", "table"):
            query.instant()
        else:
            query.range()
        if panel.kind in _FORMATS:
            query.format(_FORMATS[panel.kind])
        builder.with_target(query)
    return builder


def _lines(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True)
    legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
    builder = timeseries.Panel().legend(legend).tooltip(tooltip).fill_opacity(10)
    builder.gradient_mode(GraphGradientMode.NONE).span_nulls(panel.joins_gaps)
    least, most = panel.between
    if least is not None:
        builder.axis_soft_min(least)
    if most is not None:
        builder.axis_soft_max(most)
    if panel.kind == "stack":
        builder.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(60)
    return builder


def _number(panel: Panel) -> stat.Panel:
    newest = common.ReduceDataOptions().calcs(["lastNotNull"])
    steps = [Threshold(value=None, color="green")]
    if panel.alarm_below is not None:
        steps = [Threshold(value=None, color="red"), Threshold(panel.alarm_below, "green")]
    thresholds = ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
    builder = stat.Panel().reduce_options(newest).graph_mode(BigValueGraphMode.NONE)
    return builder.thresholds(thresholds)


def _heatmap(_panel: Panel) -> heatmap.Panel:
    colors = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues")
    return heatmap.Panel().calculate(False).color(colors)


def _table(panel: Panel) -> table.Panel:
    """The labels named in ``columns``, in their order; not the time, and not the 1 of the value."""
    options = {
        "excludeByName": {"Time": True, "Value": True},
        "indexByName": {label: place for place, (label, _) in enumerate(panel.columns)},
        "renameByName": dict(panel.columns),
    }
    return table.Panel().with_transformation(DataTransformerConfig("organize", options=options))


_FORMATS = {"table": PromQueryFormat.TABLE, "heatmap": PromQueryFormat.HEATMAP}

_BUILDERS: dict[str, Callable[[Panel], PanelBuilder]] = {
    "lines": _lines,
    "stack": _lines,
    "number": _number,
    "heatmap": _heatmap,
    "table": _table,
}


def main() -> None:
    """The command."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in dashboards().items():
        (FOLDER / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
