"""What a pipeline file says, as values of the chart: models and data handed from stage to stage.

/runs/ID/sft, reward-model, ppo     what the stages of run ID write on the run's claim
/runs/demo/...                      what the demo Job writes: base model, data, models
"""

from __future__ import annotations

import re

from kleash.base.errors import ConfigError
from kleash.cluster.helm_chart import default_values
from kleash.cluster.pipeline_config import PipelineConfig, ServiceSection, Tree
from kleash.cluster.stages import Stage
from kleash.demo.config import DemoConfig
from kleash.demo.settings import DemoSettings

RUNS = "/runs"
DEMO = "demo"

CHART_KEYS = {"demo_job": "demo", "reward_model": "rewardModel", "ppo": "trainer"}
"""Sections of the chart's values that are called differently."""

_IMAGE = re.compile(
    r"(?:(?P<registry>[^/\s]*[.:][^/\s]*|localhost)/)?(?P<repository>[^:@\s]+)"
    r"(?::(?P<tag>\w[\w.-]*))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)


def chart_values(config: PipelineConfig, run_id: str) -> Tree:
    """Values that the pipeline sets; everything else is left to the values files and the chart."""
    trees = _given_trees(config)
    sft = _sft_uri(config, run_id)
    values: Tree = {
        "run": {"id": run_id},
        # A Job that failed is deleted before the next one is made, under the same name.
        "hashJobNames": False,
        # These belong to `helm test`, and there is no release to test.
        "tests": {"enabled": False},
        "demo": {"enabled": config.demo},
        "sft": {"enabled": config.sft.enabled},
        "rewardModel": {"enabled": config.reward_model.enabled},
        "trainer": {"enabled": config.ppo.enabled},
        "policy": {"model": {"uri": sft}},
        "reference": {"model": {"uri": sft}},
        "reward": {"model": {"uri": _reward_model_uri(config, run_id)}},
    }
    if config.image is not None:
        values["image"] = _image(config.image)
    if config.sft.enabled:
        values["sft"]["model"] = {"uri": _base_uri(config)}
    if config.reward_model.enabled:
        values["rewardModel"]["model"] = {"uri": sft}
    for name, tree in trees.items():
        section, key = getattr(config, name), CHART_KEYS.get(name, name)
        values[key] |= {"config": tree} if tree else {}
        values[key] |= {"resources": section.resources} if section.resources else {}
        if isinstance(section, ServiceSection) and section.replicas is not None:
            values[key]["replicas"] = section.replicas
    return values


def _given_trees(config: PipelineConfig) -> dict[str, Tree]:
    """What the pipeline says to every stage that takes part, defaults of the demo included."""
    demo = _demo_trees(config) if config.demo else {}
    sections = ("demo_job", "sft", "reward_model", "policy", "reward", "reference", "ppo")
    trees = {}
    for name in sections:
        section = getattr(config, name)
        if config.demo if name == "demo_job" else getattr(section, "enabled", True):
            trees[name] = merged(demo.get(name, {}), section.config)
    return trees


def merged(under: Tree, over: Tree) -> Tree:
    """``over`` laid over ``under``, section by section."""
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _demo_trees(config: PipelineConfig) -> dict[str, Tree]:
    """Data and hyper-parameters of the small world, for the stages that the demo Job prepares."""
    tree = _demo_tree(config)
    demo = DemoConfig.model_validate(tree)
    settings = demo.chosen_settings
    data = f"{RUNS}/{DEMO}/data"
    shared = {"seed": demo.seed, "num_threads": demo.num_threads}
    sft, scoring = settings.sft, settings.reward_model
    return {
        "demo_job": tree,
        "sft": shared
        | {
            "data": f"{data}/sft.jsonl",
            "evaluation_fraction": 0.05,
            "learning_rate": sft.learning_rate,
            "batch_size": sft.batch_size,
            "epochs": sft.epochs,
            "loss_on_prompt": sft.loss_on_prompt,
        },
        "reward_model": shared
        | {
            "data": f"{data}/comparisons.jsonl",
            "evaluation_data": f"{data}/held-out-comparisons.jsonl",
            "learning_rate": scoring.learning_rate,
            "batch_size": scoring.batch_size,
        },
        # The chart's own settings for PPO fit the chart's own small world.
        "ppo": {} if settings == _chart_settings() else shared | _demo_ppo(settings, data),
    }


def _demo_ppo(settings: DemoSettings, data: str) -> Tree:
    ppo = settings.ppo
    return {
        "prompts": f"{data}/ppo-prompts.jsonl",
        "total_steps": ppo.total_steps,
        "batch_size": ppo.batch_size,
        "max_prompt_tokens": settings.model.max_positions - settings.max_new_tokens,
        "sampling": {"max_new_tokens": settings.max_new_tokens},
        "algorithm": {"epochs": ppo.epochs, "minibatches": ppo.minibatches},
        "kl": {"coefficient": ppo.kl_coefficient},
        "policy": {"learning_rate": ppo.learning_rate},
        "value": {"learning_rate": ppo.value_learning_rate},
        "evaluation": {
            "prompts": f"{data}/held-out.jsonl",
            "every": ppo.evaluation_every,
            "num_prompts": ppo.evaluation_prompts,
            "judge": "kleash.demo.judge:judge",
        },
    }


def _chart_settings() -> DemoSettings:
    return DemoSettings.model_validate(default_values()["demo"]["settings"])


def _demo_tree(config: PipelineConfig) -> Tree:
    """Keys of the demo Job: the chart's, which suit a small cluster, and the pipeline's over them.

    Where the pipeline trains the reward model the demo stops at its data.
    """
    chart = default_values()["demo"]
    tree = merged(chart["config"], config.demo_job.config)
    if not tree.get("quick"):
        tree = merged({"settings": chart["settings"]}, tree)
    until = "comparisons" if config.reward_model.enabled else "reward_model"
    return {"until": until} | tree


def _base_uri(config: PipelineConfig) -> str:
    if config.demo:
        return f"pvc:///{DEMO}/base"
    assert config.model is not None
    return config.model


def _sft_uri(config: PipelineConfig, run_id: str) -> str:
    if config.sft.enabled:
        return f"pvc:///{run_id}/sft"
    return config.sft.model or f"demo://{Stage.SFT}"


def _reward_model_uri(config: PipelineConfig, run_id: str) -> str:
    if config.reward_model.enabled:
        return f"pvc:///{run_id}/reward-model"
    return config.reward_model.model or f"demo://{Stage.REWARD_MODEL}"


def _image(reference: str) -> Tree:
    """Parts of an image's name. Raises ConfigError when it cannot be one."""
    match = _IMAGE.fullmatch(reference)
    if match is None or not (match["tag"] or match["digest"]):
        raise ConfigError(
            f"image is {reference!r}; write registry/repository:tag or "
            "registry/repository@sha256:..., so that every pod runs the same."
        )
    return {key: match[key] or "" for key in ("registry", "repository", "tag", "digest")}
