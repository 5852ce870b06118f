"""Logs of a run's pods: of one stage or service, as they are or as they come."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kleash.base.errors import UserError
from kleash.cluster.connection import ClusterError, UnreachableError
from kleash.cluster.diagnosis import is_finished, pods_of
from kleash.cluster.objects import POD, Manifest, Objects, labels_of, name_of
from kleash.cluster.run_record import RunRecord, StageState
from kleash.cluster.stage_view import (
    RunView,
    container_statuses,
    job_state,
    look,
    speaking_container,
    view_stage,
)
from kleash.cluster.stages import COMPONENT_LABEL, SERVICE_COMPONENTS, Stage

POLL_S = 2.0
OUTAGE_S = 600.0
"""Following ends when the API server has been away for so long."""
OVERLAP_S = 5
"""After a break the log is read again from so long before it: clocks of machines differ."""

Show = Callable[[str], None]
"""Prints a line."""


def log_names() -> tuple[str, ...]:
    """What logs can be asked for: Job stages, the services together or one by one."""
    stages = [str(stage) for stage in Stage if stage is not Stage.SETUP]
    return (*stages, *SERVICE_COMPONENTS)


def choose_stage(record: RunRecord, name: str | None) -> tuple[Stage, str | None]:
    """The stage of a name, and the service if one alone is meant; without a name the present one.

    Raises UserError.
    """
    if name is None:
        stage = Stage(record.stage) if record.stage else Stage.SETUP
        if stage is Stage.SETUP:
            raise UserError(
                f"run {record.run_id} has started no stage yet: there is no log; kleash k8s status "
                f"{record.run_id} shows what it waits for."
            )
        return stage, None
    if name in SERVICE_COMPONENTS:
        return Stage.SERVICES, name
    if name == "trainer":
        return Stage.PPO, None
    if name.replace("_", "-") not in log_names():
        raise UserError(f"there is no stage {name!r}; choose one of {', '.join(log_names())}.")
    return Stage(name.replace("_", "-")), None


def show_logs(
    objects: Objects,
    run_id: str,
    stage: Stage,
    component: str | None,
    *,
    tail_lines: int | None,
    show: Show,
) -> None:
    """Print what the stage's newest pods have logged. Raises ClusterError that says why not."""
    run = look(objects, run_id)
    pods = _newest_pods(run, stage, component)
    if not pods:
        raise ClusterError(_why_no_log(objects, run, stage))
    for pod in pods:
        for line in _lines(objects, pod, tail_lines=tail_lines, follow=False):
            show(_with_prefix(line, pod, pods))


def follow_logs(
    objects: Objects,
    run_id: str,
    stage: Stage,
    component: str | None,
    *,
    tail_lines: int | None,
    show: Show,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Print logs as they come: of a Job until it is over, of services until interrupted.

    Pods that take the place of others, and init containers before the main one, are followed too.
    Raises UnreachableError when the API server has been away for OUTAGE_S.
    """
    objects = objects.with_patience(OUTAGE_S, lambda sentence: show(f"({sentence})"), sleep)
    seen: set[tuple[str, str, int]] = set()
    told = ""
    while True:
        run = look(objects, run_id)
        pods = _newest_pods(run, stage, component)
        started = [(pod, key) for pod in pods if (key := _key(pod)) and key not in seen]
        if not pods and (why := _why_no_log(objects, run, stage)) != told:
            told = why
            show(f"({why})")
        seen.update(key for _, key in started)
        if len(started) == 1 and stage.is_job:
            for line in _lines_to_the_end(objects, started[0][0], tail_lines, show, sleep):
                show(line)
        for pod, _ in started if not stage.is_job else ():
            threading.Thread(
                target=_follow_one,
                args=(objects, pod, pods),
                kwargs={"tail_lines": tail_lines, "show": show, "sleep": sleep},
                name=f"log-{name_of(pod)}",
                daemon=True,
            ).start()
        if stage.is_job and not started and _is_over(run, stage):
            return
        sleep(POLL_S)


def _follow_one(
    objects: Objects,
    pod: Manifest,
    pods: Sequence[Manifest],
    *,
    tail_lines: int | None,
    show: Show,
    sleep: Callable[[float], None],
) -> None:
    def show_with_prefix(line: str) -> None:
        show(_with_prefix(line, pod, pods))

    try:
        for line in _lines_to_the_end(objects, pod, tail_lines, show_with_prefix, sleep):
            show_with_prefix(line)
    except (ClusterError, UnreachableError) as error:
        show_with_prefix(f"({error})")


def _lines_to_the_end(
    objects: Objects,
    pod: Manifest,
    tail_lines: int | None,
    show: Show,
    sleep: Callable[[float], None],
) -> Iterator[str]:
    """The log as it comes; where it breaks off it goes on behind the last line that came."""
    last, since_s = "", None
    came = time.monotonic()
    end = came + OUTAGE_S
    while True:
        try:
            lines = _lines(
                objects, pod, tail_lines=tail_lines, since_s=since_s, follow=True, has_times=True
            )
            for each in lines:
                written, _, line = each.partition(" ")
                came = time.monotonic()
                end = came + OUTAGE_S
                if not written[:4].isdigit():  # what a kubelet says for itself
                    yield each
                elif written > last:
                    last = written
                    yield line
            if not _is_running(objects, pod):
                return
        except UnreachableError as error:
            if time.monotonic() > end or not error.is_transient:
                raise
            show(f"({error} Following the log again.)")
        sleep(POLL_S)
        if last:
            tail_lines, since_s = None, math.ceil(time.monotonic() - came) + OVERLAP_S


def _is_running(objects: Objects, pod: Manifest) -> bool:
    """Whether the container whose log ended goes on: then somebody in between cut it off."""
    now = objects.get(POD, name_of(pod))
    if now is None or now["metadata"].get("uid") != pod["metadata"].get("uid"):
        return False
    key = _key(now)
    return (
        key is not None
        and key == _key(pod)
        and any(
            status["name"] == key[1] and "running" in (status.get("state") or {})
            for status in container_statuses(now)
        )
    )


def _lines(
    objects: Objects,
    pod: Manifest,
    *,
    tail_lines: int | None,
    follow: bool,
    since_s: int | None = None,
    has_times: bool = False,
) -> Iterator[str]:
    rest = b""
    pieces = objects.follow_log(
        name_of(pod),
        speaking_container(pod),
        tail_lines=tail_lines,
        since_s=since_s,
        follow=follow,
        has_times=has_times,
    )
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _newest_pods(run: RunView, stage: Stage, component: str | None) -> list[Manifest]:
    """The newest pod of each index of a Job; every pod of services."""
    owners = [
        owner
        for owner in run.owners(stage)
        if component is None or labels_of(owner).get(COMPONENT_LABEL) == component
    ]
    pods = [pod for owner in owners for pod in pods_of(owner, run.pods)]
    if not stage.is_job:
        return pods
    newest = {
        labels_of(pod).get("batch.kubernetes.io/job-completion-index", ""): pod for pod in pods
    }
    return list(newest.values())


def _key(pod: Manifest) -> tuple[str, str, int] | None:
    """Pod, container and its restarts; None while the container has not started."""
    container = speaking_container(pod)
    for status in container_statuses(pod):
        state = status.get("state") or {}
        if status["name"] == container and ("running" in state or "terminated" in state):
            return name_of(pod), container, status.get("restartCount", 0)
    return None


def _is_over(run: RunView, stage: Stage) -> bool:
    owners = run.owners(stage)
    states = {job_state(job) for job in owners}
    are_pods_over = all(is_finished(pod) for pod in run.stage_pods(stage))
    return bool(owners) and are_pods_over and states <= {StageState.COMPLETE, StageState.FAILED}


def _why_no_log(objects: Objects, run: RunView, stage: Stage) -> str:
    view = view_stage(objects, run, stage)
    if view.reasons:
        return f"stage {stage} has no pod: {view.reasons[0].text}"
    if not run.owners(stage):
        return f"stage {stage} has not started; kleash k8s status shows where the run is"
    if view.state is StageState.PAUSED:
        return f"stage {stage} is paused and has no pod; kleash k8s resume starts one"
    return f"stage {stage} has no pod, and with it no log; kubectl get events tells more"


def _with_prefix(line: str, pod: Manifest, pods: Sequence[Manifest]) -> str:
    return line if len(pods) == 1 else f"[{name_of(pod)}] {line}"
