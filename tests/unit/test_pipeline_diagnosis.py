"""Why pods wait: what the cluster says, made into a sentence with the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from kleash.cluster.diagnosis import Reason, describe_end, explain, failed_container
from kleash.cluster.run_record import StageState
from kleash.cluster.stage_view import job_state, speaking_container

pytestmark = pytest.mark.unit

Object = dict[str, Any]


def job(**spec: Any) -> Object:
    return {
        "kind": "Job",
        "metadata": {"name": "x-sft", "uid": "1", "labels": {}},
        "spec": {"parallelism": 1, "completions": 1, **spec},
    }


def deployment(*conditions: Object) -> Object:
    return {
        "kind": "Deployment",
        "metadata": {"name": "x-reward", "labels": {"app.kubernetes.io/component": "reward"}},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"c": "reward"}}},
        "status": {"conditions": list(conditions)},
    }


def pod(*conditions: Object, states: list[Object] | None = None, volumes: Any = ()) -> Object:
    statuses = [{"name": "kleash", "image": "example.org/k:1", **state} for state in states or ()]
    return {
        "metadata": {
            "name": "x-sft-1",
            "ownerReferences": [{"uid": "1"}],
            "labels": {"batch.kubernetes.io/job-name": "x-sft", "c": "reward"},
        },
        "spec": {"volumes": list(volumes), "containers": [{"name": "kleash"}]},
        "status": {
            "phase": "Pending",
            "conditions": list(conditions),
            "containerStatuses": statuses,
        },
    }


def warning(name: str, reason: str, message: str, time: str = "2026-11-25T12:00:00Z") -> Object:
    return {
        "metadata": {"name": "e"},
        "involvedObject": {"name": name},
        "reason": reason,
        "message": message,
        "lastTimestamp": time,
    }


UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
}
SCHEDULED = {"type": "PodScheduled", "status": "True"}
RUNS = {"name": "runs", "persistentVolumeClaim": {"claimName": "x-runs"}}


def waiting(reason: str, message: str = "", **more: Any) -> Object:
    return {"state": {"waiting": {"reason": reason, "message": message}}, **more}


def only(reasons: tuple[Reason, ...]) -> Reason:
    (reason,) = reasons
    return reason


def test_a_cluster_without_room() -> None:
    reason = only(explain([job()], [pod(UNSCHEDULABLE)], [], []))
    assert reason == Reason(
        "no node takes pod x-sft-1: 0/1 nodes are available: 1 Insufficient nvidia.com/gpu; ask "
        "for less in the pipeline's resources, or add a node that fits"
    )


def test_a_claim_that_is_not_bound() -> None:
    claim = {
        "metadata": {"name": "x-runs"},
        "spec": {"storageClassName": "fast"},
        "status": {"phase": "Pending"},
    }
    events = [
        warning("x-runs", "ProvisioningFailed", "old", "2026-11-25T11:00:00Z"),
        warning("x-runs", "ProvisioningFailed", 'storageclass "fast" not found'),
    ]
    reason = only(explain([job()], [pod(UNSCHEDULABLE, volumes=[RUNS])], [claim], events))
    assert reason.text.startswith(
        'claim x-runs of storage class fast is not bound: storageclass "fast" not found; '
    )
    assert not reason.is_stuck


def test_a_claim_that_does_not_exist() -> None:
    reason = only(explain([job()], [pod(UNSCHEDULABLE, volumes=[RUNS])], [], []))
    assert reason == Reason(
        "claim x-runs does not exist; create it, or name another in the values", is_stuck=True
    )


@pytest.mark.parametrize("cause", ["ErrImagePull", "ImagePullBackOff", "InvalidImageName"])
def test_an_image_that_cannot_be_had(cause: str) -> None:
    events = [warning("x-sft-1", "Failed", "failed to resolve reference: not found")]
    reason = only(explain([job()], [pod(SCHEDULED, states=[waiting(cause)])], [], events))
    assert reason.text == (
        f"image example.org/k:1 of pod x-sft-1 cannot be had ({cause}: failed to resolve "
        "reference: not found); check its name, and imagePullSecrets in the values"
    )
    assert reason.is_stuck


def test_a_secret_that_is_missing() -> None:
    state = waiting("CreateContainerConfigError", 'secret "hub" not found')
    reason = only(explain([job()], [pod(SCHEDULED, states=[state])], [], []))
    assert 'cannot start (CreateContainerConfigError: secret "hub" not found)' in reason.text
    assert reason.is_stuck


@pytest.mark.parametrize(
    ("end", "sentence"),
    [
        (
            {"exitCode": 137, "reason": "OOMKilled"},
            "container kleash needed more memory than its limit (OOMKilled); raise "
            "resources.limits.memory of the stage",
        ),
        (
            {"exitCode": 2, "reason": "Error"},
            "container kleash ended with status 2 (Error, its input cannot be used)",
        ),
        ({"exitCode": 9}, "container kleash ended with status 9 (Error)"),
    ],
)
def test_a_container_that_ends_again_and_again(end: Object, sentence: str) -> None:
    assert describe_end("kleash", end) == sentence
    state = waiting("CrashLoopBackOff", lastState={"terminated": end})
    reason = only(explain([deployment()], [pod(SCHEDULED, states=[state])], [], []))
    assert reason.text == (
        f"pod x-sft-1 starts again and again: {sentence}; kubectl logs x-sft-1 -c kleash "
        "--previous shows why"
    )
    assert reason.is_stuck


@pytest.mark.parametrize(
    ("message", "remedy", "is_stuck"),
    [
        ("pods is forbidden: exceeded quota: q", "or have the quota raised", False),
        ('violates PodSecurity "restricted:latest"', "the chart's own pods are restricted", True),
        ('serviceaccount "x-sft" not found', "run the pipeline again: it makes the account", True),
        ("no", "kubectl describe job x-sft shows more", True),
    ],
)
def test_a_job_that_gets_no_pod(message: str, remedy: str, is_stuck: bool) -> None:
    reason = only(explain([job()], [], [], [warning("x-sft", "FailedCreate", message)]))
    assert reason.text.startswith(f"Job x-sft gets no pod: {message}; ")
    assert reason.text.endswith(remedy)
    assert reason.is_stuck is is_stuck


def test_a_deployment_that_gets_no_pod() -> None:
    """The condition tells it, or an Event of its ReplicaSet."""
    failure = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: q"}
    reason = only(explain([deployment(failure)], [], [], []))
    assert reason.text.startswith("Deployment x-reward gets no pod: exceeded quota: q")
    events = [warning("x-reward-7d9f", "FailedCreate", "exceeded quota: r")]
    reason = only(explain([deployment()], [], [], events))
    assert reason.text.startswith("Deployment x-reward gets no pod: exceeded quota: r")


def test_a_deployment_that_takes_too_long() -> None:
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
    running = pod(SCHEDULED, states=[{"state": {"running": {}}}])
    reason = only(explain([deployment(late)], [running], [], []))
    assert reason.text.startswith("Deployment x-reward has not become ready in its time; kubectl")
    assert reason.is_stuck


def test_a_job_in_a_queue() -> None:
    queued = job(suspend=True)
    queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "team"
    reason = only(explain([queued], [], [], []))
    assert "waits in the Kueue queue team" in reason.text
    assert job_state(queued) is StageState.WAITING
    assert job_state(job(suspend=True)) is StageState.PAUSED
    assert explain([job(suspend=True)], [], [], []) == ()


def test_pods_of_an_earlier_job_of_the_same_name_are_not_its_own() -> None:
    old = pod(UNSCHEDULABLE)
    old["metadata"]["ownerReferences"] = [{"uid": "0"}]
    assert explain([job()], [old], [], []) == ()


def test_a_volume_that_cannot_be_mounted() -> None:
    events = [warning("x-sft-1", "FailedMount", "configmap not found")]
    reason = only(explain([job()], [pod(SCHEDULED)], [], events))
    assert reason.text.startswith("pod x-sft-1 cannot start: configmap not found")


def test_what_runs_or_ends_needs_no_reason() -> None:
    running = pod(SCHEDULED, states=[{"state": {"running": {}}}])
    ending = pod(UNSCHEDULABLE)
    ending["metadata"]["deletionTimestamp"] = "2026-11-25T12:00:00Z"
    old = [warning("x-sft", "FailedCreate", "exceeded quota")]
    assert explain([job()], [running], [], old) == ()
    assert explain([job()], [running, ending], [], old) == ()


def test_the_container_that_failed_and_the_one_that_speaks() -> None:
    failed = pod(SCHEDULED, states=[{"state": {"terminated": {"exitCode": 1}}}])
    assert failed_container(failed) == ("kleash", {"exitCode": 1}, False)
    restarted = pod(
        SCHEDULED,
        states=[{"state": {"running": {}}, "lastState": {"terminated": {"exitCode": 3}}}],
    )
    assert failed_container(restarted) == ("kleash", {"exitCode": 3}, True)
    fetching = pod(SCHEDULED)
    fetching["status"]["initContainerStatuses"] = [{"name": "fetch", "state": {"running": {}}}]
    assert speaking_container(fetching) == "fetch"
    fetching["status"]["initContainerStatuses"][0]["state"] = {"terminated": {"exitCode": 0}}
    assert speaking_container(fetching) == "kleash"
