"""The record of a run, ConfigMap kleash-run-ID in the cluster: what a new caller goes on from.

state, stage, message     for people: kubectl get configmap kleash-run-ID -o yaml
pipeline.toml             the pipeline as it was given, and pipeline.json as it was understood
values.yaml               what the chart was rendered with
stages.json               by stage: state, when it started and ended
objects.json              every object that was applied, so that cancel finds all of them
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from kleash.base.errors import UserError
from kleash.cluster.connection import ClusterError
from kleash.cluster.objects import CONFIG_MAP, Manifest, Objects, labels_of, name_of
from kleash.cluster.stages import COMPONENT_LABEL, PIPELINE_LABEL, RUN_LABEL, Stage

PREFIX = "kleash-run-"
COMPONENT = "run"
FILES = ("pipeline.toml", "pipeline.json", "values.yaml")


class RunState(StrEnum):
    """Of a run as a whole."""

    RUNNING = "Running"
    PAUSED = "Paused"
    FAILED = "Failed"
    COMPLETE = "Complete"
    STOPPED = "Stopped"
    """Somebody told the trainer to stop before its last step."""
    CANCELLED = "Cancelled"


class StageState(StrEnum):
    """Of one stage, as far as a caller has seen it."""

    WAITING = "Waiting"
    RUNNING = "Running"
    PAUSED = "Paused"
    FAILED = "Failed"
    COMPLETE = "Complete"
    STOPPED = "Stopped"


@dataclass(frozen=True)
class StageRecord:
    """What is known of a stage."""

    state: StageState = StageState.WAITING
    started: str = ""
    """UTC, ISO 8601; empty before."""
    ended: str = ""


@dataclass(frozen=True)
class RunRecord:
    """A run. Changes are made with the methods, which return another record."""

    run_id: str
    pipeline: str
    """Name of the pipeline."""
    state: RunState = RunState.RUNNING
    stage: str = ""
    """The stage that is or was under way."""
    message: str = ""
    """Why it failed, in one sentence, or where it was stopped."""
    created: str = ""
    uid: str = ""
    """Of the ConfigMap, for Events; empty before it is stored."""
    version: str = ""
    """resourceVersion of the ConfigMap."""
    files: dict[str, str] = field(default_factory=dict)
    """pipeline.toml, pipeline.json, values.yaml."""
    stages: dict[str, StageRecord] = field(default_factory=dict)
    objects: tuple[dict[str, str], ...] = ()
    """apiVersion, kind and name of everything that was applied."""
    caller: str = ""
    """Host and process of the caller that takes the run from stage to stage."""
    caller_seen: str = ""

    @property
    def name(self) -> str:
        """Of the ConfigMap."""
        return PREFIX + self.run_id

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be done any more, unless somebody asks for it."""
        return self.state in (RunState.COMPLETE, RunState.STOPPED, RunState.CANCELLED)

    def of(self, stage: str) -> StageRecord:
        """What is known of a stage."""
        return self.stages.get(stage, StageRecord())

    def is_complete(self, stage: Stage) -> bool:
        """Whether the stage need not run again."""
        return self.of(stage).state is StageState.COMPLETE

    def with_stage(self, stage: Stage, state: StageState) -> RunRecord:
        """The stage has come into this state now."""
        before, now = self.of(stage), utc_now()
        is_over = state in (StageState.COMPLETE, StageState.STOPPED, StageState.FAILED)
        begins = not before.started or before.state is StageState.FAILED
        after = StageRecord(
            state,
            started=now if begins else before.started,
            ended=now if is_over else "",
        )
        return replace(self, stage=str(stage), stages={**self.stages, str(stage): after})

    def with_objects(self, references: list[dict[str, str]]) -> RunRecord:
        """These objects are, or are about to be, in the cluster."""
        new = [reference for reference in references if reference not in self.objects]
        return replace(self, objects=(*self.objects, *new))


def utc_now() -> str:
    """Now, in whole seconds."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def find_runs(objects: Objects, *, pipeline: str | None = None) -> list[RunRecord]:
    """All runs of the namespace, or those of one pipeline; oldest first."""
    labels = {RUN_LABEL: None, COMPONENT_LABEL: COMPONENT, PIPELINE_LABEL: pipeline}
    found = [_read(manifest) for manifest in objects.find(CONFIG_MAP, labels)]
    return sorted(found, key=lambda record: (record.created, record.run_id))


def find_run(objects: Objects, run_id: str) -> RunRecord | None:
    """One run, or None."""
    manifest = objects.get(CONFIG_MAP, PREFIX + run_id)
    return None if manifest is None else _read(manifest)


def require_run(objects: Objects, run_id: str) -> RunRecord:
    """One run. Raises UserError that names the runs that there are."""
    record = find_run(objects, run_id)
    if record is None:
        there = ", ".join(each.run_id for each in find_runs(objects)) or "none"
        raise UserError(
            f"there is no run {run_id} in namespace {objects.namespace} (runs: {there}); "
            "kleash k8s status lists them, --namespace looks elsewhere."
        )
    return record


def create_record(objects: Objects, record: RunRecord) -> RunRecord:
    """Store a new run. Raises ClusterError of status 409 when there is one of that id."""
    return _read(objects.create(_write(record)))


def change_record(
    objects: Objects, run_id: str, change: Callable[[RunRecord], RunRecord]
) -> RunRecord:
    """Read the record, change it and store it, again if somebody else stores it in between.

    Raises UserError when there is no such run.
    """
    while True:
        before = require_run(objects, run_id)
        after = change(before)
        if after == before:
            return before
        changes = {
            "metadata": {"resourceVersion": before.version},
            "data": _write(after)["data"],
        }
        try:
            return _read(objects.merge(CONFIG_MAP, after.name, changes))
        except ClusterError as error:
            if error.status != 409:
                raise


def _write(record: RunRecord) -> Manifest:
    stages = {
        stage: {"state": str(each.state), "started": each.started, "ended": each.ended}
        for stage, each in record.stages.items()
    }
    return {
        "apiVersion": CONFIG_MAP.api_version,
        "kind": CONFIG_MAP.name,
        "metadata": {
            "name": record.name,
            "labels": {
                "app.kubernetes.io/name": "kleash",
                "app.kubernetes.io/part-of": "kleash",
                "app.kubernetes.io/managed-by": "kleash",
                COMPONENT_LABEL: COMPONENT,
                RUN_LABEL: record.run_id,
                PIPELINE_LABEL: record.pipeline,
            },
        },
        "data": {
            **record.files,
            "state": str(record.state),
            "stage": record.stage,
            "message": record.message,
            "created": record.created or utc_now(),
            "caller": record.caller,
            "caller_seen": record.caller_seen,
            "stages.json": json.dumps(stages),
            "objects.json": json.dumps(list(record.objects)),
        },
    }


def _read(manifest: Manifest) -> RunRecord:
    data: dict[str, Any] = manifest.get("data") or {}
    stages = json.loads(data.get("stages.json", "{}"))
    return RunRecord(
        run_id=name_of(manifest).removeprefix(PREFIX),
        pipeline=labels_of(manifest).get(PIPELINE_LABEL, ""),
        state=RunState(data.get("state", RunState.RUNNING)),
        stage=data.get("stage", ""),
        message=data.get("message", ""),
        created=data.get("created", ""),
        uid=manifest["metadata"].get("uid", ""),
        version=manifest["metadata"].get("resourceVersion", ""),
        files={name: data[name] for name in FILES if name in data},
        stages={
            name: StageRecord(StageState(each["state"]), each["started"], each["ended"])
            for name, each in stages.items()
        },
        objects=tuple(json.loads(data.get("objects.json", "[]"))),
        caller=data.get("caller", ""),
        caller_seen=data.get("caller_seen", ""),
    )
