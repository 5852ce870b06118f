"""Writes docs/metrics.md from the definitions of metrics and figures.

python docs/metrics_page.py [--check]     `make metrics-docs`; --check fails when it is stale

The words around the tables are in metrics.md.in.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from kleash.base import client_metrics, metrics
from kleash.base.metric import Group, Metric
from kleash.ppo.figure import Figure, Keys, Section
from kleash.ppo.figures import EVALUATION, EVALUATION_SAMPLE, SAMPLE, STEP

PAGE = Path(__file__).resolve().with_name("metrics.md")
TEMPLATE = PAGE.with_name("metrics.md.in")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def figures(section: Section, level: str) -> str:
    """Figures of metrics.jsonl below a heading."""
    head = ("key", "unit", "what it is", "when it looks wrong")
    rows = [_figure(figure) for figure in section.figures]
    return _below(level, section.title, section.note, table(head, rows))


def keys(kept: Keys) -> str:
    """Keys of a file below a heading."""
    rows = [(_code(key.name), key.unit, key.meaning) for key in kept.keys]
    return _below("##", kept.title, kept.note, table(("key", "unit", "what it is"), rows))


def group(shown: Group) -> str:
    """Metrics of Prometheus below a heading."""
    head = ("metric", "type", "unit", "labels", "what it is", "how it is computed")
    rows = [_metric(metric) for metric in shown.metrics]
    return _below("###", shown.title, shown.note, table((*head, "when it looks wrong"), rows))


def labels(groups: Iterable[Group]) -> str:
    """What each label can be."""
    users: dict[tuple[str, str], list[str]] = {}
    for metric in _metrics_of(groups):
        for label in metric.labels:
            values = ", ".join(_code(value) for value in label.values) or label.rule
            users.setdefault((label.name, values), []).append(metric.name)
    rows = [
        (_code(name), values, ", ".join(map(_code, names)))
        for (name, values), names in sorted(users.items())
    ]
    return _below("###", "Labels", "", table(("label", "what it can be", "of"), rows))


def buckets(groups: Iterable[Group]) -> str:
    """Upper bounds of the histograms."""
    users: dict[tuple[float, ...], list[str]] = {}
    for metric in _metrics_of(groups):
        if metric.buckets:
            users.setdefault(metric.buckets, []).append(metric.name)
    rows = [
        (" ".join(f"{bound:.15g}" for bound in bounds), ", ".join(map(_code, names)))
        for bounds, names in users.items()
    ]
    return _below("###", "Buckets", "", table(("upper bounds", "of"), rows))


def render() -> str:
    """The whole page."""
    every = (*metrics.GROUPS, *client_metrics.GROUPS)
    parts = {
        "step": "\n\n".join(figures(section, "###") for section in STEP),
        "evaluation": figures(EVALUATION, "##"),
        "evaluation_sample": keys(EVALUATION_SAMPLE),
        "sample": keys(SAMPLE),
        "metrics": "\n\n".join(map(group, metrics.GROUPS)),
        "client": "\n\n".join(map(group, client_metrics.GROUPS)),
        "labels": labels(every),
        "buckets": buckets(every),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{{{name}}}}}", part)
    return text


def main() -> int:
    """The command."""
    if sys.argv[1:] not in ([], ["--check"]):
        sys.stderr.write(__doc__ or "")
        return 2
    text = render()
    if not sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.stderr.write("docs/metrics.md is stale: run `make metrics-docs` and commit it\n")
        return 1
    return 0


def _figure(figure: Figure) -> tuple[str, ...]:
    return _code(figure.name), figure.unit, figure.formula, figure.remedy


def _metric(metric: Metric) -> tuple[str, ...]:
    names = " ".join(_code(label.name) for label in metric.labels)
    text = (metric.help, metric.formula, metric.remedy)
    return _code(metric.name), metric.kind, metric.unit, names, *text


def _metrics_of(groups: Iterable[Group]) -> list[Metric]:
    return [metric for each in groups for metric in each.metrics]


def _below(level: str, title: str, note: str, body: str) -> str:
    return "\n\n".join(part for part in (f"{level} {title}", note, body) if part)


def _code(name: str) -> str:
    return f"`{name}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
