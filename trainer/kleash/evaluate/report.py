"""The report of a whole pipeline as one self-contained HTML page: no script, no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kleash.evaluate.charts import Line, calibration_chart, line_chart


@dataclass(frozen=True)
class DialogueSample:
    """One prompt and what the models answered, before and after."""

    prompt: str
    kind: str
    before: str
    before_score: float
    after: str
    after_score: float


@dataclass(frozen=True)
class Curve:
    """A figure of metrics.jsonl over the steps of a run."""

    title: str
    keys: tuple[tuple[str, str], ...]
    """(key in metrics.jsonl, label) of every line."""
    y_label: str


CURVES = (
    Curve(
        "Reward-model score",
        (("score_mean", "training"), ("evaluation/score_mean", "held-out")),
        "score",
    ),
    Curve("Distance from the reference", (("kl_per_sequence", "KL"),), "nats per sequence"),
    Curve(
        "Gold judge on held-out prompts",
        (
            ("evaluation/judge/total", "total"),
            ("evaluation/judge/helpful", "helpful"),
            ("evaluation/judge/harmless", "harmless"),
            ("evaluation/judge/honest", "honest"),
        ),
        "gold score",
    ),
    Curve("Reward minus KL penalty", (("reward_mean", "reward"),), "per sequence"),
    Curve("Value network", (("explained_variance", "explained variance"),), "fraction"),
    Curve(
        "Policy update", (("clip_fraction", "clip fraction"), ("approx_kl", "approximate KL")), ""
    ),
    Curve("Entropy", (("entropy", "per token"),), "nats"),
    Curve(
        "Response length",
        (("response_length_mean", "training"), ("evaluation/response_length_mean", "held-out")),
        "tokens",
    ),
)


def render_report(
    report: dict[str, Any],
    steps: Sequence[dict[str, Any]],
    samples: Sequence[DialogueSample],
    path: Path,
) -> None:
    """Write the page. ``report`` is report.json, ``steps`` the rows of metrics.jsonl."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(
        report=report, charts=_charts(report, steps), samples=samples
    )
    path.write_text(page, encoding="utf-8")


def _charts(report: dict[str, Any], steps: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, SVG) of every chart that has figures."""
    charts = []
    for curve in CURVES:
        lines = [
            Line(
                label,
                [row["step"] for row in steps if key in row],
                [row[key] for row in steps if key in row],
            )
            for key, label in curve.keys
        ]
        lines = [line for line in lines if len(line.x)]
        if lines:
            charts.append(
                (
                    curve.title,
                    line_chart(curve.title, lines, x_label="PPO step", y_label=curve.y_label),
                )
            )
    bins = report["stages"]["reward_model"].get("calibration", [])
    if bins:
        title = "Reward model calibration"
        chart = calibration_chart(
            title, [b["predicted"] for b in bins], [b["observed"] for b in bins]
        )
        charts.append((title, chart))
    return charts
