"""A run's stages as they are in the cluster at this moment, from its Jobs, Deployments and pods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kleash.cluster.connection import ClusterError, ForbiddenError, UnreachableError
from kleash.cluster.diagnosis import (
    KUEUE_LABEL,
    Reason,
    container_statuses,
    describe_end,
    explain,
    failed_container,
    is_ending,
    is_finished,
    pods_of,
)
from kleash.cluster.objects import (
    CLAIM,
    DEPLOYMENT,
    JOB,
    POD,
    Manifest,
    Objects,
    conditions_of,
    is_true,
    labels_of,
    name_of,
)
from kleash.cluster.progress_lines import LINES_TO_READ, StageProgress, read_progress, read_stop
from kleash.cluster.run_record import StageState
from kleash.cluster.stages import RUN_LABEL, Stage, stage_of

LOG_TAIL_LINES = 30


@dataclass(frozen=True)
class StageView:
    """One stage now."""

    stage: Stage
    state: StageState = StageState.WAITING
    pods_ready: int = 0
    pods_wanted: int = 0
    progress: StageProgress | None = None
    reasons: tuple[Reason, ...] = ()
    """Why it waits; empty when it does not."""


@dataclass(frozen=True)
class RunView:
    """The objects of a run that run something."""

    jobs: dict[str, Manifest] = field(default_factory=dict)
    """By name; workloads too."""
    workloads: dict[str, Manifest] = field(default_factory=dict)
    pods: tuple[Manifest, ...] = ()

    def owners(self, stage: Stage) -> list[Manifest]:
        """Jobs or Deployments of a stage."""
        group = self.jobs if stage.is_job else self.workloads
        return [manifest for manifest in group.values() if stage_of(manifest) is stage]

    def stage_pods(self, stage: Stage) -> list[Manifest]:
        """Pods of a stage, oldest first."""
        return [pod for owner in self.owners(stage) for pod in pods_of(owner, self.pods)]


def look(objects: Objects, run_id: str) -> RunView:
    """Read the run's Jobs, Deployments and pods."""
    labels = {RUN_LABEL: run_id}
    return RunView(
        jobs={name_of(job): job for job in objects.find(JOB, labels)},
        workloads={name_of(each): each for each in objects.find(DEPLOYMENT, labels)},
        pods=tuple(objects.find(POD, labels)),
    )


def view_stage(objects: Objects, run: RunView, stage: Stage) -> StageView:
    """State, pods, progress and, where the stage does not go on, why."""
    owners = run.owners(stage)
    if not owners:
        return StageView(stage)
    state = _job_state(owners) if stage.is_job else _services_state(owners, run.pods)
    ready, wanted = _count_pods(owners, run.pods)
    progress, reasons = None, ()
    if state in (StageState.RUNNING, StageState.WAITING):
        progress = _progress(objects, run.stage_pods(stage)) if stage.is_job else None
        if ready < wanted or not run.stage_pods(stage):
            reasons = explain(owners, run.pods, *_circumstances(objects))
    if stage is Stage.PPO and state is StageState.COMPLETE:
        progress = _stop(objects, run.stage_pods(stage))
        state = StageState.STOPPED if progress else state
    return StageView(stage, state, ready, wanted, progress, reasons)


def job_state(job: Manifest) -> StageState:
    """State of a Job."""
    if is_true(job, "Complete"):
        return StageState.COMPLETE
    if is_true(job, "Failed") or is_true(job, "FailureTarget"):
        return StageState.FAILED
    if job["spec"].get("suspend"):
        return StageState.WAITING if KUEUE_LABEL in labels_of(job) else StageState.PAUSED
    return StageState.RUNNING


def describe_failure(objects: Objects, run: RunView, stage: Stage) -> tuple[str, str]:
    """What failed in a stage, in a sentence without its full stop, and the end of the log."""
    failed = [job for job in run.owners(stage) if job_state(job) is StageState.FAILED]
    conditions = [conditions_of(job) for job in failed]
    messages = [
        (its.get("Failed") or its.get("FailureTarget") or {}).get("message") or ""
        for its in conditions
    ]
    what = "; ".join(message.rstrip(".") for message in messages if message) or "it failed"
    for pod in reversed(run.stage_pods(stage)):
        found = failed_container(pod)
        if found is None:
            continue
        name, end, is_previous = found
        tail = read_tail(objects, pod, name, previous=is_previous)
        sentence = _last_error(tail)
        ended = describe_end(name, end)
        return (f"{sentence} ({ended})" if sentence else f"{what}; {ended}"), tail
    return what, ""


def read_tail(objects: Objects, pod: Manifest, container: str, *, previous: bool = False) -> str:
    """The last lines of a log; "" when it cannot be had, as when the node is gone."""
    try:
        return objects.log(name_of(pod), container, tail_lines=LOG_TAIL_LINES, previous=previous)
    except (ClusterError, UnreachableError):
        return ""


def main_container(pod: Manifest) -> str:
    """The container that does the work: the annotated one, or the first."""
    annotations = pod["metadata"].get("annotations") or {}
    default = annotations.get("kubectl.kubernetes.io/default-container")
    return default or pod["spec"]["containers"][0]["name"]


def speaking_container(pod: Manifest) -> str:
    """The container whose log tells where the pod is: an init container until it is done."""
    for status in pod.get("status", {}).get("initContainerStatuses") or []:
        state = status.get("state") or {}
        if "running" in state or (state.get("terminated") or {}).get("exitCode", 0) != 0:
            return status["name"]
    return main_container(pod)


def has_started(pod: Manifest) -> bool:
    """Whether every container of the pod runs and has passed its startup probe."""
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return bool(statuses) and all(status.get("started") for status in statuses)


def _job_state(jobs: Sequence[Manifest]) -> StageState:
    states = {job_state(job) for job in jobs}
    for state in (StageState.FAILED, StageState.RUNNING, StageState.PAUSED, StageState.WAITING):
        if state in states:
            return state
    return StageState.COMPLETE


def _services_state(workloads: Sequence[Manifest], pods: Sequence[Manifest]) -> StageState:
    is_up = all(_is_up(workload, pods) for workload in workloads)
    return StageState.COMPLETE if is_up else StageState.RUNNING


def _is_up(workload: Manifest, pods: Sequence[Manifest]) -> bool:
    """Whether the workload is rolled out.

    A policy replica becomes ready when the trainer has published to it, which comes later: it is
    up when it has started.
    """
    wanted, status = workload["spec"].get("replicas", 1), workload.get("status", {})
    if status.get("observedGeneration", 0) < workload["metadata"].get("generation", 0):
        return False
    if (status.get("updatedReplicas") or 0) < wanted:
        return False
    return _num_up(workload, pods) >= wanted


def _num_up(workload: Manifest, pods: Sequence[Manifest]) -> int:
    if not _serves_policy(workload):
        return workload.get("status", {}).get("readyReplicas") or 0
    own = pods_of(workload, pods)
    return sum(has_started(pod) for pod in own if not is_ending(pod) and not is_finished(pod))


def _circumstances(objects: Objects) -> tuple[list[Manifest], list[Manifest]]:
    """Claims and warnings of the namespace; none to a caller who may not see them."""
    try:
        return objects.find(CLAIM), objects.warnings()
    except ForbiddenError:
        return [], []


def _serves_policy(workload: Manifest) -> bool:
    """Whether a policy is in the workload's pods, alone or packed with other services."""
    containers = workload["spec"]["template"]["spec"]["containers"]
    return any(
        container.get("args", [])[:1] == ["serve"] and "policy" in container["args"]
        for container in containers
    )


def _count_pods(owners: Sequence[Manifest], pods: Sequence[Manifest]) -> tuple[int, int]:
    ready = wanted = 0
    for owner in owners:
        if owner["kind"] == "Job":
            wanted += owner["spec"].get("parallelism", 1)
            ready += owner.get("status", {}).get("ready") or 0
        else:
            wanted += owner["spec"].get("replicas", 1)
            ready += _num_up(owner, pods)
    return ready, wanted


def _progress(objects: Objects, pods: Sequence[Manifest]) -> StageProgress | None:
    """From the newest pod whose work has begun."""
    for pod in reversed(pods):
        main = main_container(pod)
        statuses = {status["name"]: status for status in container_statuses(pod)}
        if "running" in (statuses.get(main, {}).get("state") or {}):
            try:
                log = objects.log(name_of(pod), main, tail_lines=LINES_TO_READ)
            except (ClusterError, UnreachableError):
                return None
            return read_progress(log)
    return None


def _stop(objects: Objects, pods: Sequence[Manifest]) -> StageProgress | None:
    """Where the newest pod was told to stop: it ends well then, and with it its Job."""
    return read_stop(read_tail(objects, pods[-1], main_container(pods[-1]))) if pods else None


def _last_error(tail: str) -> str:
    """The sentence that kleash ends with when it fails."""
    for line in reversed(tail.splitlines()):
        if line.startswith("error: "):
            return line.removeprefix("error: ").rstrip(".")
    return ""
