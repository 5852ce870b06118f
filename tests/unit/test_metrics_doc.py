"""docs/metrics.md names all that a run writes and a process exports, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.metrics import MetricWrapperBase

from kleash.base import metrics
from kleash.base.config import describe_config
from kleash.policy.config import PolicyConfig
from kleash.ppo import loss
from kleash.ppo.config import PPOConfig
from kleash.ppo.telemetry import PHASES
from kleash.ppo.train import train
from kleash.reward_model.config import RewardModelConfig

if TYPE_CHECKING:
    from conftest import World

pytestmark = pytest.mark.unit

TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, list[str]]:
    """Cells of every table row below a "## " heading, by the name in the first cell."""
    _, found, rest = TEXT.partition(f"\n## {heading}")
    assert found, f"docs/metrics.md has no heading {heading}"
    section = rest.partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    names = [row[0].strip("`") for row in rows]
    assert len(set(names)) == len(names), f"{heading} explains a name twice"
    return dict(zip(names, rows, strict=True))


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with everything on that adds a key: evaluation, judge, pretraining, warm-up,
    calibration."""
    folder = tmp_path_factory.mktemp("metrics")
    demonstrations = folder / "demonstrations.jsonl"
    demonstrations.write_text(json.dumps({"prompt": "the quick", "completion": " brown fox"}))
    # A judge of one number is one whose only figure has the empty name.
    code = "def judge(record, response): return {'': 1.0, 'NAME': 2.0}"
    (folder / "judge_of_metrics.py").write_text(code)
    config = world.config(
        folder / "run",
        evaluation={
            "prompts": str(world.prompts),
            "num_prompts": 2,
            "judge": "judge_of_metrics:judge",
        },
        ptx={"data": str(demonstrations), "batch_size": 1},
        value={"warmup_steps": 1},
        services={"new_reward_model": "adopt", "calibration": "affine"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        train(config, world.services())
    return config.out


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_key_of_a_step_is_explained(run: Path) -> None:
    steps = [row for row in rows(run / "metrics.jsonl") if "step_s" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert {key for row in steps for key in row} == table("A step").keys()


def test_every_key_of_an_evaluation_is_explained(run: Path) -> None:
    evaluations = [row for row in rows(run / "metrics.jsonl") if "step_s" not in row]
    assert [row["step"] for row in evaluations] == [0, 2]
    documented = table("An evaluation").keys()
    assert all(row.keys() == documented for row in evaluations)
    assert {key for row in rows(run / "evaluations" / "step-000002.jsonl") for key in row} == (
        table("A sample of an evaluation").keys()
    )


def test_every_key_of_a_sample_is_explained(run: Path) -> None:
    samples = rows(run / "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 8 + [2] * 8
    documented = table("A sample of a step").keys()
    assert all(row.keys() == documented for row in samples)


def test_every_prometheus_metric_is_explained_and_every_explained_one_exists() -> None:
    defined = {}
    for collector in vars(metrics).values():
        if isinstance(collector, MetricWrapperBase):
            described = next(iter(collector.describe()))
            name = described.name + ("_total" if described.type == "counter" else "")
            defined[name] = (described.type, list(collector._labelnames))
    assert len(defined) > 30
    documented = {
        name: (row[1], re.findall(r"`(\w+)`", row[2])) for name, row in table("Prometheus").items()
    }
    assert documented == defined


def test_phase_label_has_the_names_of_the_phases() -> None:
    sentences = [
        next(iter(metrics.TRAIN_PHASE_SECONDS.describe())).documentation,
        table("Prometheus")["kleash_train_phase_seconds"][3],
    ]
    assert all(sentence.endswith(f": {', '.join(PHASES)}.") for sentence in sentences)
    keys = {key for key in table("A step") if key.startswith("time_")}
    assert keys == {f"time_{phase}_s" for phase in PHASES}


def test_functions_and_configuration_keys_that_are_named_exist() -> None:
    configurations = (PPOConfig, PolicyConfig, RewardModelConfig)
    config_keys = {key for each in configurations for key, *_ in describe_config(each)}
    last_parts = {key.rpartition(".")[2] for key in config_keys}
    known = vars(loss).keys() | table("A step").keys() | config_keys | last_parts
    cells = [cell for row in table("A step").values() for cell in row[2:]]
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)[`=]", " ".join(cells)))
    assert {"policy_loss", "token_rewards", "kl.target"} <= named
    assert named - known == {"kleash.lm.log_probs.entropy"}
