"""Which run a pipeline file means, and that run's record and objects."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from pathlib import Path

from kleash.base.config import Config, parse_tree
from kleash.base.errors import UserError
from kleash.cluster.connection import ClusterError
from kleash.cluster.helm_chart import render
from kleash.cluster.objects import Manifest, Objects
from kleash.cluster.pipeline_config import PipelineConfig
from kleash.cluster.pipeline_values import chart_values
from kleash.cluster.run_events import caller_name
from kleash.cluster.run_record import (
    RunRecord,
    change_record,
    create_record,
    find_run,
    find_runs,
    utc_now,
)
from kleash.cluster.stages import Stage, split

SUFFIX_LETTERS = "bcdfghjkmnpqrstvwxz2456789"
"""No vowels, so that no word appears, and nothing that looks like something else."""


def find_or_name(objects: Objects, config: PipelineConfig, *, is_new: bool) -> str:
    """Id of the run that ``config`` means.

    The named one; else the one of this pipeline that has not ended, unless ``is_new``; else a new
    one. Raises UserError when that is not clear.
    """
    if config.run_id is not None:
        record = find_run(objects, config.run_id)
        if record is not None and is_new:
            raise UserError(
                f"run {config.run_id} exists already; leave out --new to go on with it, or "
                "choose another --run_id."
            )
        if record is not None and record.pipeline != config.name:
            raise UserError(
                f"run {config.run_id} is one of pipeline {record.pipeline}, and this file is "
                f"pipeline {config.name}; choose another --run_id."
            )
        return config.run_id
    unfinished = [run for run in find_runs(objects, pipeline=config.name) if not run.is_over]
    if len(unfinished) > 1 and not is_new:
        raise UserError(
            f"pipeline {config.name} has {len(unfinished)} runs that have not ended "
            f"({', '.join(run.run_id for run in unfinished)}); name one with --run_id, or start "
            "another with --new."
        )
    if unfinished and not is_new:
        return unfinished[0].run_id
    return f"{config.name}-{''.join(secrets.choice(SUFFIX_LETTERS) for _ in range(5))}"


def render_run(
    config: PipelineConfig, run_id: str, namespace: str, *, folder: Path, kube_version: str = ""
) -> tuple[dict[Stage, list[Manifest]], str]:
    """The run's objects by stage, and the values that they were rendered with, as YAML.

    ``folder`` is where the pipeline's file lies. Raises ConfigError for a key that a stage or the
    chart does not know.
    """
    import yaml

    values = chart_values(config, run_id)
    files = [folder / path for path in config.values]
    manifests = render(run_id, namespace, values, values_files=files, kube_version=kube_version)
    for manifest in manifests:
        _check_configuration(manifest)
    return split(manifests, run_id=run_id), yaml.safe_dump(values, sort_keys=False)


def open_record(
    objects: Objects, config: PipelineConfig, run_id: str, *, text: str, values: str
) -> RunRecord:
    """The record of the run, made or brought up to date with the present pipeline."""
    resolved = config.model_dump(mode="json") | {"run_id": run_id, "namespace": objects.namespace}
    files = {
        "pipeline.toml": text,
        "pipeline.json": json.dumps(resolved, indent=2) + "\n",
        "values.yaml": values,
    }
    new = RunRecord(
        run_id,
        config.name,
        files=files,
        created=utc_now(),
        caller=caller_name(),
        caller_seen=utc_now(),
    )
    try:
        return create_record(objects, new)
    except ClusterError as error:
        if error.status != 409:
            raise
    return change_record(objects, run_id, lambda record: replace(record, files=files))


def _check_configuration(manifest: Manifest) -> None:
    """Check what a process will read: a typo for the last stage is found before the first one.

    Raises ConfigError that names stage and key.
    """
    from kleash.demo.config import DemoConfig
    from kleash.ppo.config import PPOConfig
    from kleash.reward_model.config import RewardModelConfig
    from kleash.sft.config import SFTConfig
    from kleash.up.config import ServeConfig

    files: dict[str, tuple[str, type[Config]]] = {
        "demo.json": ("demo_job.config", DemoConfig),
        "sft.json": ("sft.config", SFTConfig),
        "reward-model.json": ("reward_model.config", RewardModelConfig),
        "serve.json": ("config of the services", ServeConfig),
        "ppo.json": ("ppo.config", PPOConfig),
    }
    for name, text in (manifest.get("data") or {}).items():
        if manifest["kind"] == "ConfigMap" and name in files:
            place, config_class = files[name]
            parse_tree(config_class, json.loads(text), place=place)
