"""The quick clock of tests/fast_rules.py: durations and nothing else."""

from __future__ import annotations

import pytest
from tests.fast_rules import faster

pytestmark = pytest.mark.unit


def test_durations_are_divided_and_the_rest_stays() -> None:
    expression = 'max(rate(a_5m{b="[6h]x"}[5m])) - max(c offset 1h30m) > 300 and d[3d] > 1  # 5m'
    rule = {"alert": "Slow", "expr": expression, "for": "10m", "labels": {"wait": "5m"}}
    group = {"name": "one", "interval": "30s", "rules": [rule, {"record": "a:b", "expr": "up"}]}
    quick = faster(group, 30)
    assert quick == {
        "name": "one",
        "rules": [
            {
                "alert": "Slow",
                "expr": 'max(rate(a_5m{b="[6h]x"}[10000ms])) - max(c offset 180000ms) > 300 '
                "and d[8640000ms] > 1  # 5m",
                "for": "20000ms",
                "labels": {"wait": "5m"},
            },
            {"record": "a:b", "expr": "up"},
        ],
    }
    assert rule["for"] == "10m"
    assert group["interval"] == "30s"
