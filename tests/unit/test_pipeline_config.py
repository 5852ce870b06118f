"""pipeline.toml: what it may say, and what the chart is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kleash.base.config import load_config, parse_tree
from kleash.base.errors import ConfigError
from kleash.cluster.pipeline_config import PipelineConfig
from kleash.cluster.pipeline_values import chart_values, merged

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples" / "pipeline.toml"
OWN = {
    "name": "assistant",
    "model": "hf://org/base@0123abc",
    "sft": {"config": {"data": "/runs/data/demonstrations.jsonl"}},
    "reward_model": {"config": {"data": "/runs/data/comparisons.jsonl"}},
    "ppo": {"config": {"prompts": "/runs/data/prompts.jsonl"}},
}


def own(**changes: Any) -> PipelineConfig:
    return parse_tree(PipelineConfig, merged(OWN, changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "Assistant"}, "must be 1 to 34 small letters, digits and dashes"),
        ({"name": "a" * 35}, "must be 1 to 34"),
        ({"run_id": "trial-"}, "must be 1 to 40 small letters"),
        ({"model": "gpt2"}, "'gpt2' is no model; write hf://"),
        ({"model": "hf://org/base"}, "has no revision"),
        ({"model": "oci://registry/image:1"}, "has no digest"),
        ({"model": None}, "model is required: SFT starts from it"),
        ({"sft": {"enabled": False}}, "sft.model is required when sft is disabled"),
        ({"sft": {"model": "pvc://c/m"}}, "model is what stands in for the stage"),
        (
            {"sft": {"enabled": False, "model": "pvc://c/m"}},
            "model does nothing when sft is disabled",
        ),
        ({"reward_model": {"enabled": False}}, "reward_model.model is required"),
        ({"demo": True}, "demo = true makes its own models; remove model"),
        ({"demo_job": {"config": {"seed": 1}}}, "demo_job does nothing without demo = true"),
        ({"ppo": {"config": {"resume": False}}}, "ppo.config.resume follows from the pipeline"),
        ({"sft": {"config": {"out": "/runs/x"}}}, "sft.config.out follows from the pipeline"),
        ({"policy": {"replicas": 0}}, "'policy.replicas'"),
        ({"polcy": {}}, "unknown key 'polcy'; did you mean 'policy'?"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        own(**changes)
    assert sentence in str(error.value)


def test_models_are_handed_from_stage_to_stage() -> None:
    values = chart_values(own(), "assistant-x")
    assert values["run"] == {"id": "assistant-x"}
    assert values["sft"] == {
        "enabled": True,
        "model": {"uri": "hf://org/base@0123abc"},
        "config": {"data": "/runs/data/demonstrations.jsonl"},
    }
    sft, reward_model = "pvc:///assistant-x/sft", "pvc:///assistant-x/reward-model"
    assert values["rewardModel"]["model"] == {"uri": sft}
    assert values["policy"] == values["reference"] == {"model": {"uri": sft}}
    assert values["reward"] == {"model": {"uri": reward_model}}
    assert values["trainer"]["config"] == {"prompts": "/runs/data/prompts.jsonl"}
    assert values["demo"] == {"enabled": False}


def test_models_stand_in_for_stages() -> None:
    config = parse_tree(
        PipelineConfig,
        {
            "name": "ppo-only",
            "sft": {"enabled": False, "model": "pvc://models/sft"},
            "reward_model": {"enabled": False, "model": "s3://bucket/rm"},
            "ppo": {"config": {"prompts": "/runs/prompts.jsonl"}},
        },
    )
    values = chart_values(config, "ppo-only-x")
    assert (values["sft"], values["rewardModel"]) == ({"enabled": False}, {"enabled": False})
    assert values["policy"]["model"]["uri"] == "pvc://models/sft"
    assert values["reference"]["model"]["uri"] == "pvc://models/sft"
    assert values["reward"]["model"]["uri"] == "s3://bucket/rm"


def test_replicas_resources_and_keys_reach_their_component_alone() -> None:
    limits = {"limits": {"memory": "8Gi"}}
    config = own(
        policy={"replicas": 3, "config": {"dtype": "bfloat16"}},
        reward_model={"resources": limits},
        ppo={"resources": limits},
    )
    values = chart_values(config, "x")
    assert values["policy"]["replicas"] == 3
    assert values["policy"]["config"] == {"dtype": "bfloat16"}
    assert values["rewardModel"]["resources"] == values["trainer"]["resources"] == limits
    assert "replicas" not in values["reward"], "the chart's own number stays"
    assert "resources" not in values["sft"]


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("kleash:0.1.0", ("", "kleash", "0.1.0", "")),
        ("org/kleash:0.1.0", ("", "org/kleash", "0.1.0", "")),
        ("registry:5000/org/kleash:1", ("registry:5000", "org/kleash", "1", "")),
        ("localhost/kleash:1", ("localhost", "kleash", "1", "")),
        (f"ghcr.io/o/k@sha256:{'a' * 64}", ("ghcr.io", "o/k", "", f"sha256:{'a' * 64}")),
        (f"ghcr.io/o/k:1@sha256:{'a' * 64}", ("ghcr.io", "o/k", "1", f"sha256:{'a' * 64}")),
    ],
)
def test_an_image_is_taken_apart(image: str, parts: tuple[str, ...]) -> None:
    values = chart_values(own(image=image), "x")["image"]
    assert tuple(values[key] for key in ("registry", "repository", "tag", "digest")) == parts


@pytest.mark.parametrize("image", ["kleash", "registry:5000/kleash", "a b:1"])
def test_an_image_without_a_version_is_refused(image: str) -> None:
    with pytest.raises(ConfigError, match="write registry/repository:tag"):
        chart_values(own(image=image), "x")


def test_the_example_runs_the_small_world_through_every_stage() -> None:
    values = chart_values(load_config(PipelineConfig, [str(EXAMPLE)]), "small-world-x")
    assert values["demo"]["enabled"] is True
    # SFT and the reward model are the pipeline's own: the demo Job need not train one.
    assert values["demo"]["config"]["until"] == "comparisons"
    assert values["sft"]["model"] == {"uri": "pvc:///demo/base"}
    assert values["sft"]["config"]["data"] == "/runs/demo/data/sft.jsonl"
    assert values["rewardModel"]["config"]["data"] == "/runs/demo/data/comparisons.jsonl"
    assert values["reward"]["model"]["uri"] == "pvc:///small-world-x/reward-model"
    # What the chart says for PPO on its small world is not said again, only what differs.
    assert values["trainer"]["config"] == {"total_steps": 20, "checkpoint": {"every": 5}}


def test_another_small_world_takes_its_own_settings_to_ppo() -> None:
    config = load_config(PipelineConfig, [str(EXAMPLE), "--demo_job.config.quick=true"])
    values = chart_values(config, "x")
    assert values["demo"]["config"]["quick"] is True
    assert "settings" not in values["demo"]["config"]
    trainer = values["trainer"]["config"]
    assert (trainer["total_steps"], trainer["batch_size"]) == (20, 16)
    assert trainer["max_prompt_tokens"] + trainer["sampling"]["max_new_tokens"] == 96


def test_the_demo_makes_what_no_stage_makes() -> None:
    tree = {
        "name": "x",
        "demo": True,
        "reward_model": {"enabled": False},
        "sft": {"enabled": False},
    }
    values = chart_values(parse_tree(PipelineConfig, tree), "x")
    assert values["demo"]["config"]["until"] == "reward_model"
    assert values["policy"]["model"]["uri"] == "demo://sft"
    assert values["reward"]["model"]["uri"] == "demo://reward-model"


def test_values_are_plain_data() -> None:
    values = chart_values(load_config(PipelineConfig, [str(EXAMPLE)]), "x")
    assert json.loads(json.dumps(values)) == values


def test_a_laptop_needs_no_torch_to_drive_a_cluster() -> None:
    """``pip install 'kleash[k8s]'`` has none; every stage's keys are checked all the same."""
    code = (
        "import sys; from kleash.cli.main import main; status = main(['k8s', 'run', '--help']);"
        "import kleash.cluster.pipeline, kleash.cluster.steering, kleash.cluster.run_status;"
        "import kleash.cluster.run_logs, kleash.cluster.open_run;"
        "import kleash.ppo.config, kleash.sft.config, kleash.reward_model.config, kleash.up.config;"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--ppo.config" in done.stdout
    assert "--keep_services" in done.stdout
