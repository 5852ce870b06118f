"""What ``kleash k8s status`` tells: all runs of a namespace, or one run with its objects."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from kleash.cluster.connection import MissingError
from kleash.cluster.objects import CLAIM, Kind, Manifest, Objects, name_of
from kleash.cluster.progress import describe
from kleash.cluster.run_record import RunRecord, RunState, StageState, utc_now
from kleash.cluster.stage_view import RunView, StageView, job_state, look, view_stage
from kleash.cluster.stages import RUN_LABEL, Stage

ABSENT_AFTER_S = 90.0
"""A caller that was not seen for so long is gone."""

Row = dict[str, Any]


def list_runs(objects: Objects, records: list[RunRecord]) -> list[Row]:
    """A row for each run."""
    rows = []
    for record in records:
        view = _current_view(objects, look(objects, record.run_id), record)
        rows.append(
            {
                "run": record.run_id,
                "pipeline": record.pipeline,
                "state": str(record.state),
                "stage": record.stage,
                "doing": _doing(record, view),
                "age": _age(record.created),
            }
        )
    return rows


def describe_run(objects: Objects, record: RunRecord) -> dict[str, Any]:
    """One run: its stages, its objects and what can be done now."""
    run = look(objects, record.run_id)
    stages = []
    for stage in Stage:
        known = record.of(stage)
        view = view_stage(objects, run, stage)
        if stage is Stage.SETUP or (stage not in record.stages and not run.owners(stage)):
            continue
        is_over = known.state in (StageState.COMPLETE, StageState.STOPPED)
        state = known.state if is_over else view.state
        stages.append(
            {
                "stage": str(stage),
                "state": str(state),
                "started": known.started,
                "ended": known.ended,
                "doing": describe(view),
            }
        )
    return {
        "run": record.run_id,
        "pipeline": record.pipeline,
        "namespace": objects.namespace,
        "state": str(record.state),
        "stage": record.stage,
        "message": record.message,
        "created": record.created,
        "caller": record.caller,
        "caller_seen": record.caller_seen,
        "stages": stages,
        "objects": _list_objects(objects, record, run),
        "hint": hint(record),
    }


def hint(record: RunRecord) -> str:
    """What whoever looks at the run may want to do."""
    run_id = record.run_id
    hints = {
        RunState.PAUSED: f"kleash k8s resume {run_id} goes on",
        RunState.FAILED: (
            f"correct that, then kleash k8s run with --run_id={run_id} tries the stage again"
        ),
        RunState.CANCELLED: f"kleash k8s run with --run_id={run_id} takes it up again",
        RunState.STOPPED: (
            f"kleash k8s run with --run_id={run_id} goes on from its checkpoint; kleash k8s cancel "
            f"{run_id} removes its services and keeps its data"
        ),
        RunState.COMPLETE: f"kleash k8s cancel {run_id} removes its services and keeps its data",
    }
    if record.state in hints:
        return hints[record.state]
    if _seconds_since(record.caller_seen) > ABSENT_AFTER_S:
        return (
            f"no caller takes the run on to its next stage (last seen: {_age(record.caller_seen)} "
            f"ago); kleash k8s run with --run_id={run_id} does"
        )
    return f"kleash k8s logs {run_id} --follow shows what the stage prints"


def as_table(rows: list[Row]) -> str:
    """Columns for a terminal."""
    if not rows:
        return ""
    header = [name.upper() for name in rows[0]]
    cells = [header, *([str(value) or "-" for value in row.values()] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def as_text(status: Mapping[str, Any]) -> str:
    """``describe_run`` for a terminal."""
    lines = [
        f"run {status['run']} of pipeline {status['pipeline']} in namespace {status['namespace']}: "
        f"{status['state'].lower()}"
    ]
    if status["message"]:
        lines.append(f"  {status['message']}")
    lines += ["", as_table(status["stages"]), "", as_table(status["objects"]), "", status["hint"]]
    return "\n".join(lines)


def _list_objects(objects: Objects, record: RunRecord, run: RunView) -> list[Row]:
    claims = {name_of(claim): claim for claim in objects.find(CLAIM, {RUN_LABEL: record.run_id})}
    live = {
        "Job": run.jobs,
        "Deployment": run.workloads,
        "PersistentVolumeClaim": claims,
    }
    rows = []
    for reference in record.objects:
        kind, name = reference["kind"], reference["name"]
        if kind in live:
            manifest = live[kind].get(name)
        else:
            manifest = _get(objects, Kind(reference["apiVersion"], kind), name)
        state = "absent" if manifest is None else _state_of(manifest)
        rows.append({"kind": kind, "name": name, "state": state})
    return rows


def _get(objects: Objects, kind: Kind, name: str) -> Manifest | None:
    try:
        return objects.get(kind, name)
    except MissingError:
        return None


def _state_of(manifest: Manifest) -> str:
    if manifest["kind"] == "Job":
        return job_state(manifest).lower()
    if manifest["kind"] == "Deployment":
        ready = manifest.get("status", {}).get("readyReplicas") or 0
        return f"{ready}/{manifest['spec'].get('replicas', 1)} ready"
    if manifest["kind"] == "PersistentVolumeClaim":
        return str(manifest.get("status", {}).get("phase") or "Pending").lower()
    return "present"


def _current_view(objects: Objects, run: RunView, record: RunRecord) -> StageView | None:
    if not record.stage or record.stage == Stage.SETUP:
        return None
    return view_stage(objects, run, Stage(record.stage))


def _doing(record: RunRecord, view: StageView | None) -> str:
    if record.message:
        return record.message
    if record.state is RunState.RUNNING and view is not None:
        return describe(view)
    return ""


def _seconds_since(text: str) -> float:
    if not text:
        return float("inf")
    then = datetime.datetime.fromisoformat(text)
    return (datetime.datetime.fromisoformat(utc_now()) - then).total_seconds()


def _age(text: str) -> str:
    seconds = _seconds_since(text)
    if seconds == float("inf"):
        return "never"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
