"""The report of one or more PPO runs: one HTML file that needs no network and no server.

Reads nothing but run folders (run_data.py). The page's style and script are run_report.css and
run_report.js; both are named by their hashes in the page's security policy, and nothing else runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from kleash.base.durable import write_whole
from kleash.base.version import software_version
from kleash.evaluate.band_chart import (
    DASHES,
    NUM_STYLES,
    Line,
    chart_svg,
    cursor_data,
    number,
    short_number,
)
from kleash.evaluate.hacking_watch import judge_keys, watch
from kleash.evaluate.report_figures import (
    CHAPTERS,
    COMPARED,
    JUDGE_CHAPTER,
    Drawn,
    judge_figure,
)
from kleash.evaluate.report_samples import choose_samples
from kleash.evaluate.report_tables import compare, describe_runs, describe_weights
from kleash.evaluate.run_data import STATES, RunData
from kleash.evaluate.run_groups import (
    Group,
    Point,
    band,
    differing_keys,
    final_figure,
    group_runs,
    thinned,
)

MOST_POINTS = 300
"""Of a curve; more are less than two pixels apart."""
TABLE_ROWS = 12
"""Of the table of figures below a chart."""
HERE = Path(__file__).parent


def render_run_report(runs: Sequence[RunData], path: Path, *, title: str, num_samples: int) -> None:
    """Write the page. ``num_samples`` of each run are shown, from steps spread over it."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "short": short_number, "prose": _prose}
    style, script = _asset("run_report.css"), _asset("run_report.js")
    page = environment.get_template("run_report.html.j2").render(
        title=title,
        style=style,
        script=script,
        policy=_security_policy(style, script),
        dashes=DASHES,
        **content(runs, num_samples=num_samples),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)


def content(runs: Sequence[RunData], *, num_samples: int) -> dict[str, Any]:
    """Everything that the page shows, as plain values."""
    groups = group_runs(runs)
    ordered = [run for group in groups for run in group.runs]
    chapters, cursors = _charts(groups)
    samples = choose_samples(ordered, num_samples)
    return {
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": software_version(),
        "states": STATES,
        "groups": [_summary(group, index) for index, group in enumerate(groups)],
        "num_runs": len(runs),
        "has_band": any(len(group.runs) > 1 for group in groups),
        "differences": differing_keys([group.runs[0] for group in groups]),
        "findings": [(group.label, index, watch(group)) for index, group in enumerate(groups)],
        "leash_charts": _leash_charts(groups, cursors),
        "chapters": chapters,
        "comparison": compare(groups, _compared(groups)),
        "samples": samples,
        "weights": [describe_weights(run) for run in ordered],
        "runs": describe_runs(ordered),
        "data": _json_for_page({"charts": cursors, "samples": samples}),
    }


def _summary(group: Group, index: int) -> dict[str, Any]:
    """The card of a group at the top of the page."""
    tiles = [*COMPARED[:1], *COMPARED[2:3], *map(judge_figure, judge_keys(group)[:1])]
    shown = []
    for figure in tiles:
        points = band([run.series(figure.key) for run in group.runs])
        finals = [final_figure(run.series(figure.key)) for run in group.runs]
        known = [value for value in finals if value is not None]
        if known:
            shown.append(
                {
                    "title": figure.title,
                    "unit": figure.unit,
                    "first": points[0].mean,
                    "last": sum(known) / len(known),
                }
            )
    return {
        "label": group.label,
        "style": index % NUM_STYLES,
        "seeds": [run.seed for run in group.runs],
        "steps": sorted({run.last_step for run in group.runs}),
        "total_steps": sorted({run.config.get("total_steps", 0) for run in group.runs}),
        "states": list(dict.fromkeys(run.state for run in group.runs)),
        "tiles": shown,
    }


def _compared(groups: Sequence[Group]) -> list[Drawn]:
    keys = dict.fromkeys(key for group in groups for key in judge_keys(group))
    return [*COMPARED[:3], *map(judge_figure, keys), *COMPARED[3:]]


def _charts(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Chapters with their charts, and what the script needs to read them with a cursor."""
    keys = dict.fromkeys(key for group in groups for key in judge_keys(group))
    chapters, cursors = [], {}
    for chapter in CHAPTERS:
        figures = list(chapter.figures)
        if chapter.title == JUDGE_CHAPTER:
            figures = [*map(judge_figure, keys), *figures]
        charts = []
        for figure in figures:
            lines = [
                Line(group.label, index, points)
                for index, group in enumerate(groups)
                if (points := band([run.series(figure.key) for run in group.runs]))
            ]
            if lines and not (figure.is_setting and _is_constant(lines)):
                name = figure.key.replace("/", "-")
                charts.append(_chart(lines, cursors, name=name, figure=figure))
        if charts:
            chapters.append({"title": chapter.title, "charts": charts})
    return chapters, cursors


def _is_constant(lines: Sequence[Line]) -> bool:
    """Every run has one value from its first step to its last."""
    return all(
        point.low == line.points[0].low == point.high for line in lines for point in line.points
    )


def _chart(
    lines: Sequence[Line],
    cursors: dict[str, Any],
    *,
    name: str,
    figure: Drawn,
    x_label: str = "step",
) -> dict[str, Any]:
    drawn = [Line(it.label, it.style, thinned(it.points, MOST_POINTS)) for it in lines]
    cursors[name] = cursor_data(drawn)
    size = max(-(-len(line.points) // MOST_POINTS) for line in lines)
    return {
        "name": name,
        "title": figure.title,
        "key": figure.key,
        "formula": figure.defined.formula,
        "remedy": figure.defined.remedy,
        "unit": figure.unit,
        "x_label": x_label,
        "svg": chart_svg(figure.title, drawn, x_label=x_label, y_label=figure.axis),
        "steps_a_point": size,
        "tables": [(line.label, thinned(line.points, TABLE_ROWS)) for line in drawn],
        "is_thinned": any(len(line.points) > TABLE_ROWS for line in drawn),
        "has_band": any(point.low != point.high for line in drawn for point in line.points),
    }


def _leash_charts(groups: Sequence[Group], cursors: dict[str, Any]) -> list[dict[str, Any]]:
    """Score, and the judge's figure, over the square root of KL: where the curve bends down, more
    distance from the reference buys nothing (Gao, Schulman, Hilton 2022)."""
    has_evaluations = any(run.series("evaluation/score_mean") for g in groups for run in g.runs)
    prefix = "evaluation/" if has_evaluations else ""
    figures = [Drawn(f"{prefix}score_mean", "Score")]
    keys = dict.fromkeys(key for group in groups for key in judge_keys(group)[:1])
    figures += map(judge_figure, keys)
    charts = []
    for figure in figures:
        lines = [
            Line(group.label, index, points)
            for index, group in enumerate(groups)
            if (points := _over_root_kl(group, f"{prefix}kl_per_sequence", figure.key))
        ]
        if lines:
            name = f"leash-{figure.key.replace('/', '-')}"
            its = figure._replace(title=f"{figure.title} over √KL")
            charts.append(_chart(lines, cursors, name=name, figure=its, x_label="√(KL in nats)"))
    return charts


def _over_root_kl(group: Group, kl_key: str, key: str) -> list[Point]:
    """Means over the group's runs, in the order of steps, without bands: the curve may turn back.
    An estimate of KL below 0 counts as 0."""
    kl = {point.step: point.mean for point in band([run.series(kl_key) for run in group.runs])}
    return [
        Point(max(kl[point.step], 0.0) ** 0.5, point.mean, point.mean, point.mean)
        for point in band([run.series(key) for run in group.runs])
        if point.step in kl
    ]


def _prose(text: str) -> Markup:
    """Text of docs/metrics.md: names in backticks, links without their targets."""
    plain = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", text)
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(plain))))


def _asset(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8").strip())


def _security_policy(style: str, script: str) -> str:
    def source(text: str) -> str:
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _json_for_page(content: Any) -> Markup:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
