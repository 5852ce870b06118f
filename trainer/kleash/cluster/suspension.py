"""Jobs follow their run's record: suspended while it is paused, and not while it runs.

Whoever pauses or resumes writes the record first. Then it, and every caller that drives the run,
brings the Jobs to what the record says, and reads the record again: one who wrote by an older
record than another's, a moment too late, sees that and corrects it.
"""

from __future__ import annotations

from kleash.cluster.diagnosis import KUEUE_LABEL
from kleash.cluster.objects import JOB, Manifest, Objects, labels_of, name_of
from kleash.cluster.run_record import RunState, StageState, require_run
from kleash.cluster.stage_view import job_state
from kleash.cluster.stages import RUN_LABEL

IS_SUSPENDED = {RunState.PAUSED: True, RunState.RUNNING: False}
"""In other states the Jobs stay as they are."""


def obey_record(objects: Objects, run_id: str) -> list[Manifest]:
    """Suspend the unfinished Jobs of a paused run, and let those of a running one go on.

    Jobs of Kueue are left to it. Returns those that were changed, as they were before. Raises
    UserError when there is no such run.
    """
    changed: dict[str, Manifest] = {}
    state = require_run(objects, run_id).state
    while state in IS_SUSPENDED:
        for job in unfinished_jobs(objects, run_id):
            is_suspended = bool(job["spec"].get("suspend"))
            if is_suspended != IS_SUSPENDED[state] and KUEUE_LABEL not in labels_of(job):
                objects.merge(JOB, name_of(job), {"spec": {"suspend": IS_SUSPENDED[state]}})
                changed.setdefault(name_of(job), job)
        before, state = state, require_run(objects, run_id).state
        if state is before:
            break
    return list(changed.values())


def unfinished_jobs(objects: Objects, run_id: str) -> list[Manifest]:
    """The run's Jobs that may still do something."""
    return [
        job
        for job in objects.find(JOB, {RUN_LABEL: run_id})
        if job_state(job) not in (StageState.COMPLETE, StageState.FAILED)
    ]
