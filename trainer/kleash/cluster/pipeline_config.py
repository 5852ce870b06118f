"""Configuration of ``kleash k8s run``: pipeline.toml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

import pydantic

from kleash.base.config import Config

MAX_NAME = 34
"""Characters: with the suffix of a run and that of the longest object, names stay below 63."""
MAX_RUN_ID = 40

_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_MODEL_URI = re.compile(r"(hf|pvc|oci|demo|s3|gs|gcs|az|abfs|http|https|file)://\S+")

SET_BY_PIPELINE: dict[str, tuple[str, ...]] = {
    "demo_job": ("out", "run_id", "resume"),
    "sft": ("model", "out", "run_id"),
    "reward_model": ("model", "out", "run_id"),
    "policy": ("model", "weights"),
    "reward": ("model",),
    "reference": ("model",),
    "ppo": ("model", "reward_model", "out", "resume", "run_id"),
}
"""Keys of a stage that follow from the stages before it."""

Tree = dict[str, Any]


class StageSection(Config):
    """A stage that is a Job."""

    enabled: bool = True
    """Whether the stage runs."""
    config: Tree = pydantic.Field(default_factory=dict)
    """Keys of the stage's own command, such as data and learning_rate; paths are those in the pod,
    where /runs is the run's claim."""
    resources: Tree = pydantic.Field(default_factory=dict)
    """Kubernetes requests and limits of the pod; empty: the chart's."""


class TrainedSection(StageSection):
    """A stage that trains a model which later stages use."""

    model: str | None = None
    """With enabled = false: the model to use instead, as hf://org/name@revision, pvc://claim/path,
    s3://bucket/path or oci://registry/repository@sha256:..."""

    @pydantic.model_validator(mode="after")
    def _check_model(self) -> Self:
        if self.enabled and self.model is not None:
            raise ValueError("model is what stands in for the stage; set enabled to false")
        if self.model is not None:
            check_model_uri(self.model)
        return self


class ServiceSection(Config):
    """One of the three services."""

    replicas: int | None = pydantic.Field(default=None, ge=1)
    """Pods; null: the chart's number."""
    config: Tree = pydantic.Field(default_factory=dict)
    """Keys of kleash serve NAME, such as limits."""
    resources: Tree = pydantic.Field(default_factory=dict)
    """Kubernetes requests and limits of each pod; empty: the chart's."""


class DemoSection(Config):
    """The demo Job, which makes models and data of the small world."""

    config: Tree = pydantic.Field(default_factory=dict)
    """Keys of kleash demo, such as seed and quick."""
    resources: Tree = pydantic.Field(default_factory=dict)
    """Kubernetes requests and limits of the pod; empty: the chart's."""


class PipelineConfig(Config):
    """SFT, reward model, services and PPO on a cluster, one after another, as one run."""

    name: str
    """Name of the pipeline; a run is called after it, with a random suffix."""
    run_id: str | None = None
    """Name of the run, on every object and checkpoint; a run of that name goes on. null: the run of
    this pipeline that has not ended, or a new one."""
    namespace: str | None = None
    """Namespace to work in; null: that of the kubeconfig's context."""
    context: str | None = None
    """Context of the kubeconfig; null: the current one."""
    image: str | None = None
    """Container image, registry/repository:tag or ...@sha256:...; null: the chart's."""
    values: tuple[Path, ...] = ()
    """Files with values for the chart, relative to the pipeline's file: node selectors, GPUs,
    storage, authentication. What the pipeline sets itself wins."""
    model: str | None = None
    """Base model that SFT starts from, as hf://org/name@revision, pvc://claim/path, s3://bucket/path
    or oci://registry/repository@sha256:...; needed unless sft is disabled or demo is true."""
    demo: bool = False
    """Run on the small world: a first Job makes base model and data, so that the pipeline can be
    tried without any."""
    demo_job: DemoSection = DemoSection()
    """The Job of demo = true."""
    sft: TrainedSection = TrainedSection()
    """Stage 1, kleash sft."""
    reward_model: TrainedSection = TrainedSection()
    """Stage 2, kleash reward-model."""
    policy: ServiceSection = ServiceSection()
    """The policy service."""
    reward: ServiceSection = ServiceSection()
    """The reward service."""
    reference: ServiceSection = ServiceSection()
    """The reference service."""
    ppo: StageSection = StageSection()
    """Stage 3, kleash ppo."""
    keep_services: bool = True
    """Leave the services running when the run is complete: the reward model goes on scoring."""
    patience_s: float = pydantic.Field(default=600.0, gt=0)
    """Seconds that a stage may stand still for a reason that waiting seldom cures, such as an image
    that cannot be pulled, before the command gives up; its objects stay. A full cluster is waited
    for without end."""

    @pydantic.field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return _check_dns_name(value, MAX_NAME)

    @pydantic.field_validator("run_id")
    @classmethod
    def _check_run_id(cls, value: str | None) -> str | None:
        return value if value is None else _check_dns_name(value, MAX_RUN_ID)

    @pydantic.field_validator("model")
    @classmethod
    def _check_model(cls, value: str | None) -> str | None:
        return value if value is None else check_model_uri(value)

    @pydantic.model_validator(mode="after")
    def _check_chain(self) -> Self:
        if self.demo:
            given = [
                key
                for key, value in (
                    ("model", self.model),
                    ("sft.model", self.sft.model),
                    ("reward_model.model", self.reward_model.model),
                )
                if value is not None
            ]
            if given:
                raise ValueError(f"demo = true makes its own models; remove {', '.join(given)}")
        elif self.demo_job != DemoSection():
            raise ValueError("demo_job does nothing without demo = true")
        elif self.sft.enabled and self.model is None:
            raise ValueError("model is required: SFT starts from it (or set demo = true)")
        elif not self.sft.enabled and self.sft.model is None:
            raise ValueError("sft.model is required when sft is disabled: PPO starts from it")
        elif not self.sft.enabled and self.model is not None:
            raise ValueError("model does nothing when sft is disabled; set sft.model")
        elif not self.reward_model.enabled and self.reward_model.model is None:
            raise ValueError("reward_model.model is required when reward_model is disabled")
        return self

    @pydantic.model_validator(mode="after")
    def _check_own_keys(self) -> Self:
        for section, keys in SET_BY_PIPELINE.items():
            given = set(getattr(self, section).config) & set(keys)
            if given:
                raise ValueError(
                    f"{section}.config.{sorted(given)[0]} follows from the pipeline; remove it"
                )
        return self


def check_model_uri(uri: str) -> str:
    """The URI itself. Raises ValueError when it cannot be one, or lacks what pins the model."""
    if not _MODEL_URI.fullmatch(uri):
        raise ValueError(
            f"{uri!r} is no model; write hf://org/name@revision, pvc://claim/path, "
            "s3://bucket/path or oci://registry/repository@sha256:..."
        )
    if uri.startswith("hf://") and "@" not in uri:
        raise ValueError(f"{uri} has no revision, so that it may change; write {uri}@REVISION")
    if uri.startswith("oci://") and "@sha256:" not in uri:
        raise ValueError(f"{uri} has no digest, so that it may change; write {uri}@sha256:...")
    return uri


def _check_dns_name(value: str, limit: int) -> str:
    if not _NAME.fullmatch(value) or len(value) > limit:
        raise ValueError(
            f"must be 1 to {limit} small letters, digits and dashes and start with a letter"
        )
    return value
