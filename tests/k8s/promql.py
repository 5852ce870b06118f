"""Names of metrics: those that the product exports, and those that an expression asks for."""

from __future__ import annotations

import functools
import re

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from kleash.base import client_metrics, metrics

OF_EVERY_TARGET = {
    "up",
    "process_start_time_seconds",
    "process_resident_memory_bytes",
    "process_cpu_seconds_total",
}
OTHER_WORDS = re.compile(
    r'"[^"]*"'  # values of labels
    r"|\b(?:by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)"  # names of labels
    r"|\[[^\]]*\]"  # ranges
    r"|\{[^}]*\}"  # matchers
)
NAME = re.compile(r"(?<![\w:$.])([a-zA-Z_:][\w:]*)\b(?!\s*\()")
KEYWORDS = {"and", "or", "unless", "by", "on", "group_left", "group_right"}
KEYWORDS |= {"offset", "bool", "inf", "nan", "e"}
LABEL = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"')


@functools.cache
def exported() -> dict[str, set[str]]:
    """Every series of a Kleash process with its labels, ``le`` of a bucket among them."""
    series: dict[str, set[str]] = {name: set() for name in OF_EVERY_TARGET}
    for value in (*vars(metrics).values(), *vars(client_metrics).values()):
        if not isinstance(value, MetricWrapperBase):
            continue
        labels = set(value._labelnames)
        if isinstance(value, Histogram):
            series[f"{value._name}_bucket"] = {*labels, "le"}
            series[f"{value._name}_count"] = labels
            if value._upper_bounds[0] >= 0:  # the sum of scores may fall: there is none
                series[f"{value._name}_sum"] = labels
        elif isinstance(value, Counter):
            series[f"{value._name}_total"] = labels
        else:
            assert isinstance(value, Gauge)
            series[value._name] = labels
    return series


def names_in(expression: str) -> set[str]:
    """Names of the series that an expression reads."""
    text = re.sub(r"#[^\n]*", "", expression)
    text = re.sub(r"\boffset\s+\w+", "", OTHER_WORDS.sub(" ", text))
    return {name for name in NAME.findall(text) if name not in KEYWORDS}


def matchers_in(expression: str) -> list[tuple[str, set[str]]]:
    """(series, names of the labels in its braces) for every selector with braces."""
    found = re.findall(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}", expression)
    return [(name, set(LABEL.findall(inside))) for name, inside in found]
