"""The report page: every figure of report.json is on it, text is escaped, charts are inline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kleash.evaluate.report import DialogueSample, render_report

pytestmark = pytest.mark.unit


def _report() -> dict[str, Any]:
    scores = {"total": 0.123, "helpful": 0.456, "harmless": 0.789, "honest": -0.321}
    return {
        "title": "A run",
        "summary": "What it is.",
        "stages": {
            "sft": {"loss": 0.5},
            "reward_model": {
                "accuracy": 0.701,
                "accuracy_ci95": [0.6, 0.8],
                "label_noise_ceiling": 0.777,
                "gold_sign_accuracy": 0.888,
                "calibration": [
                    {"predicted": 0.1, "observed": 0.2},
                    {"predicted": 0.9, "observed": 0.8},
                ],
            },
            "ppo": {
                "steps": 2,
                "kl_per_sequence_nats": 3.14,
                "reward_mean_first": 0.0,
                "reward_mean_last": 1.0,
            },
        },
        "gold": dict.fromkeys(("base", "sft", "ppo"), scores),
        "win_rate": {"ppo_vs_sft": {"rate": 0.654, "ci95": [0.61, 0.7], "n": 512}},
        "wall_seconds": {"sft": 12.5},
        "versions": {"kleash": "9.9"},
        "digests": {"sft": "sha256:abc"},
    }


def test_page_holds_the_figures_and_escapes_text(tmp_path: Path) -> None:
    steps = [
        {"step": 1, "score_mean": 0.0, "kl_per_sequence": 0.0},
        {"step": 2, "score_mean": 1.0, "kl_per_sequence": 2.0},
    ]
    samples = [DialogueSample("<b>hi</b>", "sum", "before", 0.25, "after", 0.75)]
    render_report(_report(), steps, samples, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for figure in (
        "65.4",
        "70.1",
        "77.7",
        "88.8",
        "3.14",
        "0.456",
        "sha256:abc",
        "n = 512",
        "12.5",
        "(better)",
    ):
        assert figure in page
    assert "<b>hi</b>" not in page
    assert "&lt;b&gt;hi&lt;/b&gt;" in page
    assert page.count("<svg ") == 3  # score, KL, calibration: no curve without figures


def test_page_is_self_contained_and_charts_take_the_text_colour(tmp_path: Path) -> None:
    render_report(_report(), [{"step": 1, "score_mean": 0.0}], [], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"']https?:", page)
    assert "<script" not in page
    assert "currentColor" in page
    assert "#010203" not in page
    assert page.count('role="img"') == page.count("<svg ")


def test_a_figure_that_is_missing_is_an_error_not_a_gap(tmp_path: Path) -> None:
    report = _report()
    del report["gold"]["ppo"]["honest"]
    with pytest.raises(Exception, match="honest"):
        render_report(report, [], [], tmp_path / "report.html")
