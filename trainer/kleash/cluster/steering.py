"""Pause, resume and cancel a run. Each may be said again, and then finds nothing left to do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

from kleash.base.errors import UserError
from kleash.cluster.connection import ClusterError, ForbiddenError, MissingError
from kleash.cluster.diagnosis import KUEUE_LABEL
from kleash.cluster.objects import (
    CLAIM,
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    POD,
    Kind,
    Objects,
    labels_of,
    name_of,
)
from kleash.cluster.run_events import emit
from kleash.cluster.run_record import (
    RunRecord,
    RunState,
    StageRecord,
    StageState,
    change_record,
    find_run,
    require_run,
)
from kleash.cluster.stage_view import look, view_stage
from kleash.cluster.stages import COMPONENT_LABEL, RUN_LABEL, Stage, stage_of
from kleash.cluster.suspension import obey_record, unfinished_jobs

LEASE = Kind("coordination.k8s.io/v1", "Lease")
SERVICE = Kind("v1", "Service")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy")

_FIRST_TO_GO = (JOB, DEPLOYMENT)
"""What makes pods; the trainer's goes with a checkpoint while the services still answer."""
_KNOWN_KINDS = (*_FIRST_TO_GO, SERVICE, CONFIG_MAP, NETWORK_POLICY)
"""Looked through even when the record does not name them."""

POLL_S = 1.0


def pause(objects: Objects, run_id: str) -> str:
    """Suspend the run's Job: its pods end, the trainer with a checkpoint. Returns what was done."""
    for job in unfinished_jobs(objects, run_id):
        if queue := labels_of(job).get(KUEUE_LABEL):
            raise UserError(
                f"Job {name_of(job)} is started and stopped by Kueue (queue {queue}); pause it "
                "there: set spec.active to false in its Workload."
            )
    before = require_run(objects, run_id)
    record = change_record(objects, run_id, _paused)
    suspended = obey_record(objects, run_id)
    if before.state is RunState.PAUSED and not suspended:
        return f"run {run_id} is paused already; kleash k8s resume {run_id} goes on"
    emit(objects, record, "Paused", f"paused in stage {record.stage or 'setup'}")
    lost = [str(stage_of(job)) for job in suspended if not stage_of(job).has_checkpoints]
    note = (
        f"; {', '.join(lost)} has no checkpoints and begins anew then"
        if lost
        else "; the trainer goes on from its checkpoint"
        if suspended
        else ""
    )
    return f"run {run_id} is paused; kleash k8s resume {run_id} goes on{note}"


def _paused(record: RunRecord) -> RunRecord:
    if record.state not in (RunState.RUNNING, RunState.PAUSED):
        raise UserError(
            f"run {record.run_id} is {record.state.lower()}: there is nothing to pause; kleash k8s "
            "status shows the runs that go on."
        )
    return replace(record, state=RunState.PAUSED)


def resume(objects: Objects, run_id: str) -> str:
    """Let a paused run go on. Returns what was done."""
    was_paused = require_run(objects, run_id).state is RunState.PAUSED
    record = change_record(objects, run_id, _resumed)
    # Also a Job that was suspended by hand.
    started = obey_record(objects, run_id)
    if not was_paused and not started:
        return f"run {run_id} is not paused"
    emit(objects, record, "Resumed", f"resumed in stage {record.stage or 'setup'}")
    return f"run {run_id} goes on"


def _resumed(record: RunRecord) -> RunRecord:
    if record.state not in (RunState.RUNNING, RunState.PAUSED):
        raise UserError(
            f"run {record.run_id} is {record.state.lower()}, not paused; kleash k8s run with "
            f"--run_id={record.run_id} takes it up again."
        )
    return replace(record, state=RunState.RUNNING)


def cancel(
    objects: Objects,
    run_id: str,
    *,
    delete_data: bool = False,
    wait_s: float = 120.0,
    tell: Callable[[str], None] = lambda _: None,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Delete what the run has in the cluster, but for its data and its record.

    ``delete_data`` deletes these too. Waits up to ``wait_s`` for the pods to end. Returns what was
    done. Raises UserError when there is no such run.
    """
    record = find_run(objects, run_id)
    labels = {RUN_LABEL: run_id}
    claims, jobs = objects.find(CLAIM, labels), objects.find(JOB, labels)
    if record is None and not claims and not jobs:
        record = require_run(objects, run_id)
    if record is not None and record.state is not RunState.CANCELLED:
        run = look(objects, run_id)
        stages = {stage_of(job) for job in jobs}
        complete = {
            stage
            for stage in stages
            if view_stage(objects, run, stage).state is StageState.COMPLETE
        }
        record = change_record(objects, run_id, lambda its: _cancelled(its, complete))
        emit(objects, record, "Cancelled", f"cancelled in stage {record.stage or 'setup'}")
    kinds = _kinds_of(record)
    num_deleted = _delete_all(objects, kinds, labels)
    _wait_for_pods(objects, labels, wait_s=wait_s, tell=tell, sleep=sleep)
    # What a caller applied in the moment in which the run was cancelled.
    num_deleted += _delete_all(objects, kinds, labels)
    for job in jobs:
        if stage_of(job) is Stage.PPO:
            # The trainer made its Lease itself, under the name of its Job. Left behind it harms
            # nobody: it expires.
            with contextlib.suppress(ForbiddenError):
                objects.delete(LEASE, name_of(job))
    done = f"run {run_id} is cancelled ({num_deleted} objects deleted)"
    names = ", ".join(name_of(claim) for claim in claims) or "none of its own"
    if not delete_data:
        return (
            f"{done}; kept: claim {names} with /runs/{run_id}, and the record; "
            f"kleash k8s cancel {run_id} --delete_data deletes them, kleash k8s run with "
            f"--run_id={run_id} goes on from them"
        )
    for claim in claims:
        objects.delete(CLAIM, name_of(claim))
    if record is not None:
        objects.delete(CONFIG_MAP, record.name)
    return f"{done}, with its record and its data (claim {names})"


def _cancelled(record: RunRecord, complete: set[Stage]) -> RunRecord:
    """What runs is gone; complete Job stages left their results on the claim.

    ``complete`` are those whose Jobs say so, which no caller may have seen yet.
    """
    for stage in complete:
        if record.of(stage).state not in (StageState.COMPLETE, StageState.STOPPED):
            record = replace(record.with_stage(stage, StageState.COMPLETE), stage=record.stage)
    stages = {
        name: each if Stage(name).is_job and record.is_complete(Stage(name)) else StageRecord()
        for name, each in record.stages.items()
    }
    return replace(record, state=RunState.CANCELLED, stages=stages)


def _kinds_of(record: RunRecord | None) -> list[Kind]:
    """Kinds of everything that the run applied: what makes pods first."""
    recorded = [Kind(each["apiVersion"], each["kind"]) for each in record.objects] if record else []
    kinds = dict.fromkeys((*_KNOWN_KINDS, *recorded))
    return [kind for kind in kinds if kind != CLAIM]


def _delete_all(objects: Objects, kinds: list[Kind], labels: dict[str, str]) -> int:
    num_deleted = 0
    for kind in kinds:
        try:
            found = objects.find(kind, labels)
        except MissingError:  # the kind's definition is gone, and with it its objects
            continue
        for manifest in found:
            if labels_of(manifest).get(COMPONENT_LABEL) == "run":
                continue
            num_deleted += objects.delete(kind, name_of(manifest))
    return num_deleted


def _wait_for_pods(
    objects: Objects,
    labels: dict[str, str],
    *,
    wait_s: float,
    tell: Callable[[str], None],
    sleep: Callable[[float], None],
) -> None:
    end, told = time.monotonic() + wait_s, 0
    while pods := objects.find(POD, labels):
        if len(pods) != told:
            told = len(pods)
            tell(f"waiting for {told} pods to end")
        if time.monotonic() > end:
            raise ClusterError(
                f"{told} pods still run {wait_s:.0f} s after the run was cancelled "
                f"({', '.join(name_of(pod) for pod in pods[:3])}); they may be saving a "
                "checkpoint: run the same command again to wait on."
            )
        sleep(POLL_S)
