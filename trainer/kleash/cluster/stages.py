"""The stages of a run, and which of the chart's objects belong to which.

    setup ──► demo ──► sft ──► reward-model ──► services ──► ppo

setup is everything that runs nothing: accounts, the claim, Services, policies. Every other stage is
one Job with its configuration, or the Deployments of the services.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from enum import StrEnum

from kleash.cluster.objects import Manifest, kind_of, labels_of, name_of

RUN_LABEL = "kleash.dev/run"
STAGE_LABEL = "kleash.dev/stage"
PIPELINE_LABEL = "kleash.dev/pipeline"
COMPONENT_LABEL = "app.kubernetes.io/component"
SETTINGS_ANNOTATION = "kleash.dev/settings-sha256"
"""On a Job: digest of the stage's objects that it was made with."""

SERVICE_COMPONENTS = ("policy", "reward", "reference")


class Stage(StrEnum):
    """In the order in which they run."""

    SETUP = "setup"
    DEMO = "demo"
    SFT = "sft"
    REWARD_MODEL = "reward-model"
    SERVICES = "services"
    PPO = "ppo"

    @property
    def is_job(self) -> bool:
        """Whether the stage is over when its Job is."""
        return self not in (Stage.SETUP, Stage.SERVICES)

    @property
    def has_checkpoints(self) -> bool:
        """Whether the stage goes on where it was when its pod is started again."""
        return self is Stage.PPO


_STAGE_OF_COMPONENT = {
    "demo": Stage.DEMO,
    "sft": Stage.SFT,
    "reward-model": Stage.REWARD_MODEL,
    "trainer": Stage.PPO,
    **dict.fromkeys(SERVICE_COMPONENTS, Stage.SERVICES),
}

_KINDS_OF_A_STAGE = {
    "ConfigMap",
    "Job",
    "Deployment",
    "HorizontalPodAutoscaler",
    "ScaledObject",
    "PodDisruptionBudget",
}
"""Kinds that wait for their stage; all others are there from the beginning."""

_KINDS_WITH_PODS = ("Job", "Deployment")
_APPLIED_FIRST = ("ServiceAccount", "Secret", "ConfigMap", "PersistentVolumeClaim", "Role")
_APPLIED_LAST = ("Job", "Deployment", "HorizontalPodAutoscaler", "ScaledObject")


def stage_of(manifest: Manifest) -> Stage:
    """The stage that an object belongs to: its label, or by kind and component."""
    labels = labels_of(manifest)
    if STAGE_LABEL in labels:
        return Stage(labels[STAGE_LABEL])
    if manifest["kind"] not in _KINDS_OF_A_STAGE:
        return Stage.SETUP
    return _STAGE_OF_COMPONENT.get(labels.get(COMPONENT_LABEL, ""), Stage.SETUP)


def split(manifests: Iterable[Manifest], *, run_id: str) -> dict[Stage, list[Manifest]]:
    """Objects by stage, in the order of stages and in an order to apply them in.

    Every object gets the labels of run and stage, and is said to be managed by kleash, not by Helm:
    ``helm upgrade`` of a release of the same name does not take it over unnoticed.
    """
    found: dict[Stage, list[Manifest]] = {stage: [] for stage in Stage}
    for manifest in manifests:
        labelled = copy.deepcopy(manifest)
        stage = stage_of(manifest)
        labelled["metadata"]["labels"] = {
            **labels_of(manifest),
            "app.kubernetes.io/managed-by": "kleash",
            RUN_LABEL: run_id,
            STAGE_LABEL: str(stage),
        }
        _label_pods(labelled, {RUN_LABEL: run_id, STAGE_LABEL: str(stage)})
        if labelled["kind"] == "Job":
            # A Job is what tells that its stage is complete: it goes with the run.
            labelled["spec"].pop("ttlSecondsAfterFinished", None)
        found[stage].append(labelled)
    return {stage: sorted(group, key=_order) for stage, group in found.items() if group}


def jobs_of(manifests: Iterable[Manifest]) -> list[Manifest]:
    """The Jobs among the objects of a stage."""
    return [manifest for manifest in manifests if manifest["kind"] == "Job"]


def settings_digest(manifests: Iterable[Manifest]) -> str:
    """Digest of what a stage's objects say: the same for the same settings."""
    text = json.dumps(list(manifests), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_annotation(manifest: Manifest, changes: Mapping[str, str]) -> Manifest:
    """A copy of the object with more annotations."""
    changed = copy.deepcopy(manifest)
    metadata = changed["metadata"]
    metadata["annotations"] = {**(metadata.get("annotations") or {}), **changes}
    return changed


def reference_of(manifest: Manifest) -> dict[str, str]:
    """What names an object, for the record of a run."""
    kind = kind_of(manifest)
    return {"apiVersion": kind.api_version, "kind": kind.name, "name": name_of(manifest)}


def _label_pods(manifest: Manifest, labels: Mapping[str, str]) -> None:
    template = (manifest.get("spec") or {}).get("template")
    if isinstance(template, dict) and manifest["kind"] in _KINDS_WITH_PODS:
        metadata = template.setdefault("metadata", {})
        metadata["labels"] = {**(metadata.get("labels") or {}), **labels}


def _order(manifest: Manifest) -> tuple[int, str, str]:
    kind = manifest["kind"]
    if kind in _APPLIED_FIRST:
        return (_APPLIED_FIRST.index(kind), kind, name_of(manifest))
    if kind in _APPLIED_LAST:
        return (100 + _APPLIED_LAST.index(kind), kind, name_of(manifest))
    return (50, kind, name_of(manifest))
