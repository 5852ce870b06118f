"""Takes a run from stage to stage: SFT Job, reward-model Job, services, PPO Job.

    setup ──► demo ──► sft ──► reward-model ──► services ──► ppo
                         │ apply, then look every few seconds until it is complete or has failed

What has happened is in the cluster, in the Jobs and in the run's record, and nowhere else: this
process may die at any moment, and the next one goes on.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kleash.cluster.connection import ClusterError
from kleash.cluster.objects import JOB, Manifest, Objects, kind_of, name_of
from kleash.cluster.progress import describe
from kleash.cluster.run_events import caller_name, emit
from kleash.cluster.run_record import (
    RunRecord,
    RunState,
    StageState,
    change_record,
    find_run,
    utc_now,
)
from kleash.cluster.stage_view import (
    RunView,
    StageView,
    describe_failure,
    job_state,
    look,
    view_stage,
)
from kleash.cluster.stages import (
    SETTINGS_ANNOTATION,
    Stage,
    jobs_of,
    reference_of,
    settings_digest,
    with_annotation,
)
from kleash.cluster.suspension import obey_record

POLL_S = 2.0
SEEN_EVERY_S = 20.0
"""How often the caller writes that it is alive."""
OUTAGE_S = 600.0
"""An API server that is away for so long ends the command; the run goes on without it."""
DELETE_LIMIT_S = 120.0
MOVING_AFTER_S = 60.0
"""Without a stuck pod for so long the stage moves again: a crashing container runs now and then."""


class Display(Protocol):
    """What the driver tells whoever watches."""

    def note(self, text: str) -> None:
        """One thing that happened."""

    def show(self, view: StageView) -> None:
        """A stage as it is now; called again and again."""

    def log(self, title: str, text: str) -> None:
        """The end of a log."""


class StageFailedError(ClusterError):
    """A stage failed; the message says which, why, and how to go on."""


class RunCancelledError(ClusterError):
    """Somebody cancelled the run while it was being driven."""


@dataclass
class Driver:
    """One caller of one run."""

    objects: Objects
    record: RunRecord
    manifests: dict[Stage, list[Manifest]]
    """What the chart gives for the run, by stage."""
    display: Display
    again: str
    """The command that goes on with this run."""
    patience_s: float = 600.0
    keep_services: bool = True
    poll_s: float = POLL_S
    sleep: Callable[[float], None] = time.sleep
    _stuck_since: float = 0.0
    _stuck_seen: float = 0.0

    def __post_init__(self) -> None:
        self.objects = self.objects.with_patience(
            OUTAGE_S,
            lambda sentence: self.display.note(f"{sentence} The run goes on; looking again."),
            self.sleep,
        )

    # ------------------------------------------------------------------------------------ the run

    def run(self) -> RunRecord:
        """Until the last stage is complete.

        Raises StageFailedError, RunCancelledError, another ClusterError or UnreachableError.
        """
        last = max(self.manifests, key=list(Stage).index)
        if self.record.is_complete(last) and self.record.state is RunState.COMPLETE:
            self.display.note(f"run {self.record.run_id} is complete already")
            return self.record
        self._change(_taken_up)
        for stage in Stage:
            if stage in self.manifests:
                self._run_stage(stage)
        if self.record.of(last).state is StageState.STOPPED:
            return self.record
        self._change(lambda record: replace(record, state=RunState.COMPLETE, stage=str(last)))
        self._emit("RunCompleted", "every stage is complete")
        if not self.keep_services and Stage.PPO in self.manifests:
            self._remove_services()
        return self.record

    def _run_stage(self, stage: Stage) -> None:
        if stage is Stage.SETUP:
            self._apply(self.manifests[stage])
            self._set_stage(stage, StageState.COMPLETE)
            return
        if stage.is_job and self._is_done(stage):
            self.display.show(StageView(stage, self.record.of(stage).state))
            return
        self._wait_while_paused(stage)
        if self._start(stage):
            self._set_stage(stage, StageState.RUNNING)
            self._emit("StageStarted", f"stage {stage} has started")
        self._wait(stage)

    def _is_done(self, stage: Stage) -> bool:
        """Whether a Job stage was complete before: by the record, or by its Jobs.

        A finished Job may have been deleted by its time to live; then the record alone knows. A
        stage that was stopped goes on when that was told before.
        """
        if self.record.of(stage).state is StageState.STOPPED:
            return False
        jobs = self._live_jobs(stage)
        expected = jobs_of(self.manifests[stage])
        by_jobs = bool(expected) and all(
            name_of(job) in jobs and job_state(jobs[name_of(job)]) is StageState.COMPLETE
            for job in expected
        )
        if not self.record.is_complete(stage) and by_jobs:
            view = view_stage(self.objects, look(self.objects, self.record.run_id), stage)
            self._end_stage(stage, view)
            if view.state is StageState.STOPPED:
                return True
        if self.record.is_complete(stage) and self._has_changed(stage, jobs.values()):
            self.display.note(
                f"stage {stage} is complete with other settings than those of now; its result is "
                "kept (--new starts a run from the beginning)"
            )
        return self.record.is_complete(stage)

    def _start(self, stage: Stage) -> bool:
        """Apply the objects of a stage; False when its Jobs run already."""
        live = self._live_jobs(stage)
        was_stopped = self.record.of(stage).state is StageState.STOPPED
        over = (StageState.FAILED, StageState.COMPLETE) if was_stopped else (StageState.FAILED,)
        for name in [name for name, job in live.items() if job_state(job) in over]:
            before = "was stopped" if was_stopped else "failed"
            self.display.note(f"stage {stage} {before} before; Job {name} is made anew")
            self._delete_job(name)
            del live[name]
        if stage.is_job and live:
            if self._has_changed(stage, live.values()):
                self.display.note(
                    f"stage {stage} runs with other settings than those of now, and goes on with "
                    f"them; kleash k8s cancel {self.record.run_id} first would change them"
                )
            return False
        was_running = self.record.of(stage).state is StageState.RUNNING
        self._apply(self._with_digest(stage))
        return stage.is_job or not was_running

    def _wait(self, stage: Stage) -> None:
        """Until the stage is complete. Raises StageFailedError."""
        self._stuck_since = 0.0
        while True:
            run = look(self.objects, self.record.run_id)
            view = view_stage(self.objects, run, stage)
            self._refresh()
            # A Job may have been applied in the moment in which somebody paused the run.
            is_paused = self.record.state is RunState.PAUSED and stage.is_job
            if is_paused and obey_record(self.objects, self.record.run_id):
                continue
            if view.state is StageState.WAITING and not run.owners(stage):
                raise self._failure(
                    stage,
                    f"its {'Job' if stage.is_job else 'services'} has been deleted by somebody",
                )
            self.display.show(view)
            if view.state in (StageState.COMPLETE, StageState.STOPPED):
                self._end_stage(stage, view)
                return
            if view.state is StageState.FAILED:
                self._fail(stage, run)
            self._give_up_if_stuck(stage, view)
            self.sleep(self.poll_s)

    # ---------------------------------------------------------------------------- pause and cancel

    def _wait_while_paused(self, stage: Stage) -> None:
        self._refresh()
        while self.record.state is RunState.PAUSED:
            self.display.show(StageView(stage, StageState.PAUSED))
            self.sleep(self.poll_s)
            self._refresh()

    def _refresh(self) -> None:
        """Read the record, and write that this caller lives. Raises RunCancelledError."""
        found = find_run(self.objects, self.record.run_id)
        if found is None or found.state is RunState.CANCELLED:
            raise RunCancelledError(
                f"run {self.record.run_id} was cancelled; the same command with "
                f"--run_id={self.record.run_id} takes it up again."
            )
        self.record = found
        if _age_s(self.record.caller_seen) > SEEN_EVERY_S or self.record.caller != caller_name():
            self._change(
                lambda record: replace(record, caller=caller_name(), caller_seen=utc_now())
            )

    # --------------------------------------------------------------------------------- the cluster

    def _apply(self, manifests: Sequence[Manifest]) -> None:
        references = [reference_of(manifest) for manifest in manifests]
        self._change(lambda record: record.with_objects(references))
        for manifest in manifests:
            apply_object(self.objects, manifest)

    def _with_digest(self, stage: Stage) -> list[Manifest]:
        group = self.manifests[stage]
        notes = {SETTINGS_ANNOTATION: settings_digest(group)}
        return [
            with_annotation(manifest, notes) if manifest["kind"] == "Job" else manifest
            for manifest in group
        ]

    def _has_changed(self, stage: Stage, jobs: Iterable[Manifest]) -> bool:
        digest = settings_digest(self.manifests[stage])
        made_with = {
            (job["metadata"].get("annotations") or {}).get(SETTINGS_ANNOTATION, digest)
            for job in jobs
        }
        return bool(made_with - {digest})

    def _live_jobs(self, stage: Stage) -> dict[str, Manifest]:
        return live_jobs(self.objects, self.manifests[stage])

    def _delete_job(self, name: str) -> None:
        self.objects.delete(JOB, name)
        end = time.monotonic() + DELETE_LIMIT_S
        while self.objects.get(JOB, name) is not None:
            if time.monotonic() > end:
                raise ClusterError(
                    f"Job {name} is still being deleted after {DELETE_LIMIT_S:.0f} s; see kubectl "
                    f"describe job {name}, then run the same command again."
                )
            self.sleep(min(self.poll_s, 1.0))

    def _remove_services(self) -> None:
        for manifest in self.manifests.get(Stage.SERVICES, []):
            self.objects.delete(kind_of(manifest), name_of(manifest))
        self.display.note("the services were removed (keep_services = false)")

    # ------------------------------------------------------------------------------------- records

    def _change(self, change: Callable[[RunRecord], RunRecord]) -> None:
        """Change the record of the run, as it is now, in the cluster."""
        self.record = change_record(self.objects, self.record.run_id, change)

    def _set_stage(self, stage: Stage, state: StageState) -> None:
        self._change(lambda record: record.with_stage(stage, state))

    def _end_stage(self, stage: Stage, view: StageView) -> None:
        """The stage is complete, or somebody told the trainer to stop: the run ends there."""
        if view.state is not StageState.STOPPED:
            self._set_stage(stage, StageState.COMPLETE)
            self._emit("StageCompleted", f"stage {stage} is complete")
            return
        where = describe(view)
        self._change(
            lambda record: replace(
                record.with_stage(stage, StageState.STOPPED), state=RunState.STOPPED, message=where
            )
        )
        self._emit("RunStopped", f"stage {stage} was {where}")

    def _emit(self, reason: str, note: str, *, is_warning: bool = False) -> None:
        emit(self.objects, self.record, reason, note, is_warning=is_warning)
        self.display.note(note)

    def _fail(self, stage: Stage, run: RunView) -> None:
        what, tail = describe_failure(self.objects, run, stage)
        if tail:
            self.display.log(f"end of the log of stage {stage}", tail)
        raise self._failure(stage, what)

    def _failure(self, stage: Stage, what: str) -> StageFailedError:
        self._change(
            lambda record: replace(
                record.with_stage(stage, StageState.FAILED), state=RunState.FAILED, message=what
            )
        )
        self._emit("StageFailed", f"stage {stage} failed: {what}", is_warning=True)
        return StageFailedError(
            f"stage {stage} of run {self.record.run_id} failed: {what}; correct that and run "
            f"'{self.again}' again, which keeps what is complete."
        )

    def _give_up_if_stuck(self, stage: Stage, view: StageView) -> None:
        now = time.monotonic()
        stuck = [reason for reason in view.reasons if reason.is_stuck]
        if stuck:
            self._stuck_seen = now
            self._stuck_since = self._stuck_since or now
        elif now - self._stuck_seen > MOVING_AFTER_S:
            self._stuck_since = 0.0
        if stuck and now - self._stuck_since >= self.patience_s:
            raise self._failure(stage, f"{stuck[0].text} (for {self.patience_s:.0f} s now)")


def try_objects(
    objects: Objects, run_id: str, manifests: Mapping[Stage, Sequence[Manifest]]
) -> None:
    """Try to apply everything without storing it, so that what is refused is refused now.

    Jobs that are there already are left out: a Job's pods cannot be changed. Raises ClusterError.
    """
    look(objects, run_id)  # whoever may not see pods would find out in the first stage
    for group in manifests.values():
        there = live_jobs(objects, group)
        for manifest in group:
            if manifest["kind"] != "Job" or name_of(manifest) not in there:
                objects.apply(manifest, force=True, dry_run=True)


def live_jobs(objects: Objects, manifests: Sequence[Manifest]) -> dict[str, Manifest]:
    """By name, those of the Jobs that are in the cluster, as they are there."""
    found = (objects.get(JOB, name_of(job)) for job in jobs_of(manifests))
    return {name_of(job): job for job in found if job is not None}


def apply_object(objects: Objects, manifest: Manifest) -> None:
    """Apply; where somebody else has set a field differently the pipeline wins.

    But for replicas: who scaled a service by hand, or let something scale it, keeps that number.
    """
    try:
        objects.apply(manifest)
        return
    except ClusterError as error:
        if error.status != 409:
            raise
    live = objects.get(kind_of(manifest), name_of(manifest)) or {}
    replicas = (live.get("spec") or {}).get("replicas")
    if replicas is not None and "replicas" in manifest["spec"]:
        manifest = {**manifest, "spec": {**manifest["spec"], "replicas": replicas}}
    objects.apply(manifest, force=True)


def _taken_up(record: RunRecord) -> RunRecord:
    """The record of a run that somebody drives again."""
    state = RunState.PAUSED if record.state is RunState.PAUSED else RunState.RUNNING
    return replace(record, state=state, message="", caller=caller_name(), caller_seen=utc_now())


def _age_s(time_text: str) -> float:
    """Seconds since a time of the record; infinite for none."""
    if not time_text:
        return math.inf
    then = datetime.datetime.fromisoformat(time_text)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds()
