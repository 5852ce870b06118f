"""Why something in a cluster does not go on: what is seen, and what to do about it.

Pure functions of objects as the API gives them; nothing here asks the cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kleash.cluster.objects import Manifest, conditions_of, labels_of, name_of

JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
KUEUE_LABEL = "kueue.x-k8s.io/queue-name"

_IMAGE_REASONS = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "RegistryUnavailable",
}
_CONFIG_REASONS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}


@dataclass(frozen=True)
class Reason:
    """Why something waits, with the remedy."""

    text: str
    is_stuck: bool = False
    """Time alone seldom helps: somebody has to change something."""


def explain(
    owners: Sequence[Manifest],
    pods: Sequence[Manifest],
    claims: Sequence[Manifest],
    warnings: Sequence[Manifest],
) -> tuple[Reason, ...]:
    """Why the Jobs and Deployments ``owners``, with these pods, do not go on.

    ``claims`` and ``warnings`` are all of the namespace. Nothing twice; most telling first.
    """
    reasons: list[Reason] = []
    for owner in owners:
        own_pods = pods_of(owner, pods)
        reasons.extend(_why_no_pods(owner, own_pods, warnings))
        for pod in own_pods:
            reasons.extend(_why_pod_waits(pod, claims, warnings))
    return tuple(sorted(dict.fromkeys(reasons), key=lambda reason: not reason.is_stuck))


def pods_of(owner: Manifest, pods: Iterable[Manifest]) -> list[Manifest]:
    """The pods of a Job or a Deployment, oldest first.

    Pods of an earlier Job of the same name, which go a while after it, are not among them.
    """
    if owner["kind"] == "Job":
        wanted = {JOB_NAME_LABEL: name_of(owner)}
    else:
        wanted = owner["spec"]["selector"].get("matchLabels") or {}
    found = [
        pod
        for pod in pods
        if wanted.items() <= labels_of(pod).items()
        if owner["kind"] != "Job" or _is_owned(pod, owner)
    ]
    return sorted(found, key=lambda pod: pod["metadata"].get("creationTimestamp") or "")


def _is_owned(pod: Manifest, owner: Manifest) -> bool:
    owners = pod["metadata"].get("ownerReferences") or []
    return any(each["uid"] == owner["metadata"].get("uid") for each in owners)


def is_ending(pod: Manifest) -> bool:
    """Whether the pod is being deleted."""
    return bool(pod["metadata"].get("deletionTimestamp"))


def is_finished(pod: Manifest) -> bool:
    """Whether all of the pod's containers have ended for good."""
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def container_statuses(pod: Manifest) -> list[dict[str, Any]]:
    """Of all containers, init containers first."""
    status = pod.get("status", {})
    return [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]


def failed_container(pod: Manifest) -> tuple[str, dict[str, Any], bool] | None:
    """Name and end of the container that failed, and whether it has been started again since."""
    for status in container_statuses(pod):
        for key, is_previous in (("state", False), ("lastState", True)):
            end = (status.get(key) or {}).get("terminated")
            if end and end.get("exitCode", 0) != 0:
                return status["name"], end, is_previous
    return None


def describe_end(name: str, end: dict[str, Any]) -> str:
    """How a container ended, with the remedy where the way it ended tells one."""
    code, reason = end.get("exitCode"), end.get("reason") or "Error"
    if reason == "OOMKilled":
        return (
            f"container {name} needed more memory than its limit (OOMKilled); raise "
            "resources.limits.memory of the stage"
        )
    meaning = {2: "its input cannot be used", 3: "a service failed", 137: "killed", 143: "stopped"}
    known = f", {meaning[code]}" if code in meaning else ""
    return f"container {name} ended with status {code} ({reason}{known})"


def _why_no_pods(
    owner: Manifest, pods: Sequence[Manifest], warnings: Sequence[Manifest]
) -> list[Reason]:
    kind, name = owner["kind"], name_of(owner)
    spec = owner["spec"]
    if kind == "Job" and spec.get("suspend"):
        if queue := labels_of(owner).get(KUEUE_LABEL):
            return [
                Reason(
                    f"Job {name} waits in the Kueue queue {queue}; "
                    "kubectl get workloads shows its place"
                )
            ]
        return []
    conditions = conditions_of(owner)
    found = []
    progressing = conditions.get("Progressing", {})
    if progressing.get("reason") == "ProgressDeadlineExceeded":
        found.append(
            Reason(
                f"{kind} {name} has not become ready in its time; kubectl describe pods -l "
                f"app.kubernetes.io/component={labels_of(owner).get('app.kubernetes.io/component')}"
                " shows more",
                is_stuck=True,
            )
        )
    wanted = _wanted_pods(owner)
    living = [pod for pod in pods if not is_ending(pod) and not is_finished(pod)]
    if len(living) >= wanted:
        return found
    failure = conditions.get("ReplicaFailure", {})
    message = failure.get("message") if failure.get("status") == "True" else None
    message = message or _newest(warnings, {name}, reason="FailedCreate", prefix=f"{name}-")
    if message:
        found.append(_refused_pod(kind, name, message))
    return found


def _wanted_pods(owner: Manifest) -> int:
    spec = owner["spec"]
    if owner["kind"] != "Job":
        return spec.get("replicas", 1)
    done = owner.get("status", {}).get("succeeded") or 0
    return max(min(spec.get("parallelism", 1), (spec.get("completions") or 1) - done), 0)


def _refused_pod(kind: str, name: str, message: str) -> Reason:
    text = " ".join(message.split()).rstrip(".")
    if "exceeded quota" in text:
        remedy = "ask for less in the pipeline's resources, or have the quota raised"
    elif "violates PodSecurity" in text:
        remedy = "remove what it names from the values; the chart's own pods are restricted"
    elif "serviceaccount" in text.lower():
        remedy = "run the pipeline again: it makes the account"
    else:
        remedy = f"kubectl describe {kind.lower()} {name} shows more"
    return Reason(f"{kind} {name} gets no pod: {text}; {remedy}", is_stuck="quota" not in text)


def _why_pod_waits(
    pod: Manifest, claims: Sequence[Manifest], warnings: Sequence[Manifest]
) -> list[Reason]:
    name = name_of(pod)
    if is_ending(pod) or is_finished(pod):
        return []
    scheduled = conditions_of(pod).get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return _why_unscheduled(pod, scheduled, claims, warnings)
    found = [
        reason
        for status in container_statuses(pod)
        if (reason := _why_container_waits(name, status, warnings))
    ]
    has_started = any(
        (status.get("state") or {}).get("running") for status in container_statuses(pod)
    )
    if not found and not has_started:
        for event in ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"):
            if message := _newest(warnings, {name}, reason=event):
                found.append(
                    Reason(f"pod {name} cannot start: {message}; kubectl describe pod {name}")
                )
    return found


def _why_unscheduled(
    pod: Manifest,
    scheduled: dict[str, Any],
    claims: Sequence[Manifest],
    warnings: Sequence[Manifest],
) -> list[Reason]:
    volumes = pod.get("spec", {}).get("volumes") or []
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in volumes
        if "persistentVolumeClaim" in volume
    }
    pending = [
        claim
        for claim in claims
        if name_of(claim) in used and claim.get("status", {}).get("phase") != "Bound"
    ]
    found = [_why_claim_waits(claim, warnings) for claim in pending]
    missing = used - {name_of(claim) for claim in claims}
    found.extend(
        Reason(f"claim {name} does not exist; create it, or name another in the values", True)
        for name in sorted(missing)
    )
    message = " ".join((scheduled.get("message") or "").split()).rstrip(".")
    if not found and scheduled.get("reason") == "SchedulingGated":
        found.append(Reason(f"pod {name_of(pod)} is held back by a scheduling gate"))
    elif not found:
        found.append(
            Reason(
                f"no node takes pod {name_of(pod)}: {message or 'not scheduled yet'}; ask for "
                "less in the pipeline's resources, or add a node that fits"
            )
        )
    return found


def _why_claim_waits(claim: Manifest, warnings: Sequence[Manifest]) -> Reason:
    name = name_of(claim)
    storage_class = claim.get("spec", {}).get("storageClassName")
    message = _newest(warnings, {name})
    seen = f"of storage class {storage_class}" if storage_class else "without a storage class"
    why = f": {message}" if message else ""
    return Reason(
        f"claim {name} {seen} is not bound{why}; kubectl get storageclass lists the classes, the "
        "values of the chart choose one"
    )


def _why_container_waits(
    pod: str, status: dict[str, Any], warnings: Sequence[Manifest]
) -> Reason | None:
    waiting = (status.get("state") or {}).get("waiting")
    if not waiting:
        return None
    reason, name = waiting.get("reason") or "", status["name"]
    message = " ".join((waiting.get("message") or "").split()).rstrip(".")
    if reason in _IMAGE_REASONS:
        pulled = _newest(warnings, {pod}, reason="Failed") or message
        return Reason(
            f"image {status.get('image')} of pod {pod} cannot be had ({reason}: {pulled}); check "
            "its name, and imagePullSecrets in the values",
            is_stuck=True,
        )
    if reason in _CONFIG_REASONS:
        return Reason(
            f"container {name} of pod {pod} cannot start ({reason}: {message}); a Secret or "
            "ConfigMap that the values name may be missing",
            is_stuck=True,
        )
    if reason == "CrashLoopBackOff":
        end = (status.get("lastState") or {}).get("terminated") or {}
        return Reason(
            f"pod {pod} starts again and again: {describe_end(name, end)}; "
            f"kubectl logs {pod} -c {name} --previous shows why",
            is_stuck=True,
        )
    return None


def _newest(
    warnings: Iterable[Manifest], names: set[str], *, reason: str = "", prefix: str = ""
) -> str:
    """Message of the newest Event about one of these objects; "" without any."""
    found = [
        event
        for event in warnings
        if not reason or event.get("reason") == reason
        if _is_about(event, names, prefix)
    ]
    if not found:
        return ""
    message = max(found, key=_time_of).get("message") or ""
    return " ".join(message.split()).rstrip(".")


def _is_about(event: Manifest, names: set[str], prefix: str) -> bool:
    name = (event.get("involvedObject") or {}).get("name") or ""
    return name in names or bool(prefix and name.startswith(prefix))


def _time_of(event: Manifest) -> str:
    series = event.get("series") or {}
    return (
        series.get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
        or ""
    )
