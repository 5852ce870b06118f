"""``kleash demo --quick`` from nothing: every stage, services as processes, a whole report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

DIMENSIONS = ("total", "helpful", "harmless", "honest")
TIMED = ("base", "sft", "candidates", "reward_model", "ppo", "evaluation", "total")
REQUIRED = (
    "stages.sft.loss",
    "stages.reward_model.accuracy",
    "stages.reward_model.accuracy_ci95",
    "stages.reward_model.label_noise_ceiling",
    "stages.reward_model.gold_sign_accuracy",
    "stages.ppo.steps",
    "stages.ppo.kl_per_sequence_nats",
    "stages.ppo.reward_mean_first",
    "stages.ppo.reward_mean_last",
    *(f"gold.{model}.{name}" for model in ("base", "sft", "ppo") for name in DIMENSIONS),
    "win_rate.ppo_vs_sft.rate",
    "win_rate.ppo_vs_sft.ci95",
    "win_rate.ppo_vs_sft.n",
    *(f"wall_seconds.{stage}" for stage in TIMED),
    "versions.torch",
    "digests.sft",
    "digests.reward_model",
    "digests.ppo",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick run."""
    out = tmp_path_factory.mktemp("demo") / "run"
    command = [
        sys.executable,
        "-m",
        "kleash.cli",
        "demo",
        "--quick",
        f"--out={out}",
        "--num_threads=1",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "PPO beats SFT on" in result.stdout
    return out


def _at(report: dict[str, Any], path: str) -> Any:
    value: Any = report
    for part in path.split("."):
        value = value[part]
    return value


def test_report_json_is_complete_and_finite(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    for path in REQUIRED:
        value = _at(report, path)
        numbers = value if isinstance(value, list) else [value]
        assert all(isinstance(n, str) or math.isfinite(n) for n in numbers), path
    assert report["stages"]["ppo"]["steps"] == 3
    assert report["win_rate"]["ppo_vs_sft"]["n"] == 60


def test_annotators_disagree_as_people_do(demo: Path) -> None:
    figures = json.loads((demo / "report.json").read_text())["stages"]["reward_model"]
    assert 0.2 <= figures["annotator_disagreement"] <= 0.3
    assert figures["accuracy"] <= figures["label_noise_ceiling"] + 0.1


def test_report_page_shows_dialogues_side_by_side(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert page.count("<tr><td>") >= 9  # a dialogue of every kind at least
    assert page.count("<svg ") >= 8


def test_lineage_goes_from_base_to_policy(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    lineage = {
        name: json.loads((demo / folder / "kleash.json").read_text())
        for name, folder in (
            ("sft", "sft"),
            ("reward_model", "reward-model"),
            ("ppo", "ppo/policy"),
        )
    }
    assert lineage["sft"]["parent_digest"] == report["digests"]["base"]
    assert lineage["reward_model"]["parent_digest"] == report["digests"]["sft"]
    assert lineage["ppo"]["parent_digest"] == report["digests"]["sft"]
    assert len({entry["lineage_id"] for entry in lineage.values()}) == 1


def test_checkpoints_load_with_plain_transformers(demo: Path) -> None:
    policy = transformers.AutoModelForCausalLM.from_pretrained(demo / "ppo" / "policy")
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(demo / "reward-model")
    assert scorer.config.num_labels == 1
    assert policy.config.vocab_size == scorer.config.vocab_size


def test_services_ran_as_processes_of_their_own(demo: Path) -> None:
    assert sorted(path.name for path in (demo / "ppo" / "logs").iterdir()) == [
        "policy.log", "reference.log", "reward.log",
    ]  # fmt: skip
