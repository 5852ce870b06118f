"""Plays the controllers, the scheduler and the kubelets of a test cluster: pods of Jobs and
Deployments appear, run and end as a script says. Objects and their checks are the real ones."""

from __future__ import annotations

import copy
import json
import secrets
import ssl
import threading
from collections.abc import Callable
from http.client import HTTPSConnection
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from tests.k8s.api_server import ApiServer
from tests.k8s.kubelet import NODE, Kubelet

Outcome = Literal["complete", "fail", "hang", "unschedulable", "no image"]

STAGE = "kleash.dev/stage"
COMPONENT = "app.kubernetes.io/component"
JOB_NAME = "batch.kubernetes.io/job-name"
TIME = "2026-11-25T12:00:00Z"

Object = dict[str, Any]


class RefusedError(RuntimeError):
    """What the API server refused, and its status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(f"{status} {message}")
        self.status = status


class Controllers:
    """Of one namespace. ``step`` does one thing for every object; as a context manager a thread
    steps by itself."""

    def __init__(
        self, api_server: ApiServer, namespace: str, kubelet: Kubelet | None = None
    ) -> None:
        self.api = api_server
        self.namespace = namespace
        self.kubelet = kubelet
        self.script: dict[str, list[Outcome]] = {}
        """By stage: how its pods end, one after another; complete when nothing is said."""
        self.created: list[str] = []
        """Stages of Jobs in the order in which their first pods started."""
        self.lines = {
            "fail": ["loading", "error: the data /runs/none.jsonl does not exist; correct it."]
        }
        """What containers print: those of a stage when they start, any that fails at its end."""
        self.on_step: Callable[[], None] = lambda: None
        self._outcomes: dict[str, Outcome] = {}
        url = urlsplit(api_server.host)
        context = ssl.create_default_context(cafile=str(api_server.ca_file))
        self._connection = HTTPSConnection(str(url.hostname), url.port, timeout=30, context=context)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._problem: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stopping.set()
        self._thread.join()
        if self._problem is not None:
            raise self._problem

    def _run(self) -> None:
        try:
            while not self._stopping.wait(0.05):
                self.step()
        except Exception as error:
            self._problem = error

    def step(self) -> None:
        """One pass over everything."""
        jobs = self.items("/apis/batch/v1", "jobs")
        deployments = self.items("/apis/apps/v1", "deployments")
        pods = self.items("/api/v1", "pods")
        owners = {each["metadata"]["uid"] for each in (*jobs, *deployments)}
        for pod in pods:
            if pod["metadata"]["ownerReferences"][0]["uid"] not in owners:
                self._now_or_later(self._delete_pod, pod)
        for job in jobs:
            self._now_or_later(self._step_job, job, [pod for pod in pods if _is_of(pod, job)])
        for each in deployments:
            own = [pod for pod in pods if _is_of(pod, each)]
            self._now_or_later(self._step_deployment, each, own)
        if not pods:
            self._unprotect_claims()
        self.on_step()

    def _now_or_later(self, act: Callable[..., None], *arguments: object) -> None:
        """Another hand may have changed or deleted the object: the next pass sees that."""
        try:
            act(*arguments)
        except RefusedError as error:
            if error.status not in (404, 409):
                raise

    def items(self, group: str, plural: str) -> list[Object]:
        """All objects of a kind."""
        return self.request("GET", f"{group}/namespaces/{self.namespace}/{plural}")["items"]

    def request(self, method: str, path: str, body: Object | None = None) -> Any:
        """As ``ApiServer.request``, over one connection that stays open."""
        headers = {
            "Authorization": f"Bearer {self.api.token}",
            "Content-Type": "application/json",
        }
        self._connection.request(method, path, None if body is None else json.dumps(body), headers)
        with self._connection.getresponse() as reply:
            text = reply.read()
        if reply.status >= 300:
            raise RefusedError(f"{method} {path}: {text.decode(errors='replace')}", reply.status)
        return json.loads(text)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def outcomes_are_now(self, outcome: Outcome) -> None:
        """Pods that hang or stand still, and those to come, go on to this end."""
        self.script = {}
        self._outcomes = dict.fromkeys(self._outcomes, outcome)

    def _unprotect_claims(self) -> None:
        """A claim that is being deleted goes when no pod uses it."""
        for claim in self.items("/api/v1", "persistentvolumeclaims"):
            if claim["metadata"].get("deletionTimestamp"):
                claim["metadata"]["finalizers"] = []
                self.request("PUT", self._path("/api/v1", "persistentvolumeclaims", claim), claim)

    # ----------------------------------------------------------------------------------------- Jobs

    def _step_job(self, job: Object, pods: list[Object]) -> None:
        conditions = {each["type"] for each in job["status"].get("conditions", ())}
        if conditions & {"Complete", "Failed"}:
            return
        if job["spec"].get("suspend"):
            for pod in pods:
                self._delete_pod(pod)
            if "Suspended" not in conditions:
                self._set_job(job, {"active": 0, "ready": 0}, "Suspended")
            return
        if not pods:
            stage = job["metadata"]["labels"][STAGE]
            waiting = self.script.get(stage, [])
            uid = job["metadata"]["uid"]
            if uid not in self._outcomes:
                self.created.append(stage)
                self._outcomes[uid] = waiting.pop(0) if waiting else "complete"
            self._create_pod(job, job["spec"]["template"], {JOB_NAME: job["metadata"]["name"]})
            return
        (pod,) = pods
        outcome = self._outcomes[job["metadata"]["uid"]]
        phase = pod["status"].get("phase")
        if outcome in ("unschedulable", "no image"):
            self._stand_still(pod, outcome)
        elif phase == "Pending":
            self._set_pod(pod, "Running")
            self._set_job(job, {"active": 1, "ready": 1})
            self._log(pod, self.lines.get(job["metadata"]["labels"][STAGE], []))
        elif outcome == "complete":
            self._set_pod(pod, "Succeeded", exit_code=0)
            self._set_job(job, {"succeeded": 1}, "SuccessCriteriaMet", "Complete")
        elif outcome == "fail":
            self._set_pod(pod, "Failed", exit_code=2)
            self._set_job(job, {"failed": 1}, "FailureTarget", "Failed")

    def _set_job(self, job: Object, counts: Object, *conditions: str) -> None:
        status = {"startTime": TIME, **counts}
        if "Suspended" in conditions:
            del status["startTime"]
        if "Complete" in conditions:
            status["completionTime"] = TIME
        status["conditions"] = [
            {
                "type": each,
                "status": "True",
                "lastTransitionTime": TIME,
                "lastProbeTime": TIME,
                "reason": "BackoffLimitExceeded" if "Fail" in each else each,
                "message": "Job has reached the specified backoff limit" if "Fail" in each else "",
            }
            for each in conditions
        ]
        status["uncountedTerminatedPods"] = {}
        self._put_status("/apis/batch/v1", "jobs", {**job, "status": status})

    # --------------------------------------------------------------------------------- Deployments

    def _step_deployment(self, deployment: Object, pods: list[Object]) -> None:
        spec, component = deployment["spec"], deployment["metadata"]["labels"][COMPONENT]
        wanted = spec.get("replicas", 1)
        outcome = (self.script.get(component) or ["complete"])[0]
        for pod in pods[wanted:]:
            self._delete_pod(pod)
        for _ in range(wanted - len(pods)):
            self._create_pod(deployment, spec["template"], {})
        living = pods[:wanted]
        for pod in living:
            if outcome != "complete":
                self._stand_still(pod, outcome)
            elif pod["status"].get("phase") == "Pending":
                self._set_pod(pod, "Running", is_ready=component != "policy")
        num_running = sum(pod["status"].get("phase") == "Running" for pod in living)
        num_ready = 0 if component == "policy" else num_running
        deployment["status"] = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": len(living),
            "updatedReplicas": len(living),
            "readyReplicas": num_ready,
            "availableReplicas": num_ready,
            "unavailableReplicas": wanted - num_ready,
        }
        self._put_status("/apis/apps/v1", "deployments", deployment)

    # ----------------------------------------------------------------------------------------- pods

    def _create_pod(self, owner: Object, template: Object, labels: dict[str, str]) -> None:
        template = copy.deepcopy(template)
        metadata = template.setdefault("metadata", {})
        metadata["name"] = f"{owner['metadata']['name']}-{secrets.token_hex(3)}"
        metadata["labels"] = {**metadata.get("labels", {}), **labels}
        metadata["ownerReferences"] = [
            {
                "apiVersion": owner.get("apiVersion") or _api_version(owner),
                "kind": owner.get("kind") or _kind(owner),
                "name": owner["metadata"]["name"],
                "uid": owner["metadata"]["uid"],
                "controller": True,
            }
        ]
        template["spec"].pop("nodeName", None)
        self.request("POST", f"/api/v1/namespaces/{self.namespace}/pods", template)

    def _set_pod(
        self, pod: Object, phase: str, *, exit_code: int | None = None, is_ready: bool = True
    ) -> None:
        if not pod["spec"].get("nodeName"):
            self._bind(pod)
            pod = self.request("GET", self._path("/api/v1", "pods", pod))
        ended = {"exitCode": 0, "reason": "Completed", "startedAt": TIME, "finishedAt": TIME}
        if exit_code is None:
            state: Object = {"running": {"startedAt": TIME}}
        else:
            reason = "Error" if exit_code else "Completed"
            state = {"terminated": {**ended, "exitCode": exit_code, "reason": reason}}
        is_running = exit_code is None
        pod["status"] = {
            **pod["status"],
            "phase": phase,
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": str(is_running and is_ready)},
            ],
            "initContainerStatuses": [
                _container(each, {"terminated": ended}, is_running=False)
                for each in pod["spec"].get("initContainers", ())
            ],
            "containerStatuses": [
                _container(each, state, is_running=is_running, is_ready=is_ready)
                for each in pod["spec"]["containers"]
            ],
        }
        self._put_status("/api/v1", "pods", pod)
        if exit_code is not None:
            self._log(pod, self.lines["fail"] if exit_code else [], is_over=True)

    def _log(self, pod: Object, lines: list[str], *, is_over: bool = False) -> None:
        if self.kubelet is None:
            return
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]["name"]
        self.kubelet.log(self.namespace, name, container, *lines)
        if is_over:
            self.kubelet.end_log(self.namespace, name, container)

    def _stand_still(self, pod: Object, outcome: Outcome) -> None:
        if outcome == "unschedulable":
            condition = {
                "type": "PodScheduled",
                "status": "False",
                "reason": "Unschedulable",
                "message": "0/1 nodes are available: 1 Insufficient cpu.",
            }
            pod["status"] = {"phase": "Pending", "conditions": [condition]}
        else:
            waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
            pod["status"] = {
                "phase": "Pending",
                "conditions": [{"type": "PodScheduled", "status": "True"}],
                "containerStatuses": [
                    _container(each, {"waiting": waiting}, is_running=False)
                    for each in pod["spec"]["containers"]
                ],
            }
        self._put_status("/api/v1", "pods", pod)

    def _bind(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        target = {"apiVersion": "v1", "kind": "Node", "name": NODE}
        self.request(
            "POST",
            f"/api/v1/namespaces/{self.namespace}/pods/{name}/binding",
            {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target},
        )

    def _delete_pod(self, pod: Object) -> None:
        self.request("DELETE", self._path("/api/v1", "pods", pod), {"gracePeriodSeconds": 0})

    def _put_status(self, group: str, plural: str, item: Object) -> None:
        self.request("PUT", f"{self._path(group, plural, item)}/status", item)

    def _path(self, group: str, plural: str, item: Object) -> str:
        return f"{group}/namespaces/{self.namespace}/{plural}/{item['metadata']['name']}"


def _container(spec: Object, state: Object, *, is_running: bool, is_ready: bool = True) -> Object:
    return {
        "name": spec["name"],
        "image": spec["image"],
        "imageID": "",
        "ready": is_running and is_ready,
        "started": is_running,
        "restartCount": 0,
        "state": state,
    }


def _is_of(pod: Object, owner: Object) -> bool:
    return pod["metadata"]["ownerReferences"][0]["uid"] == owner["metadata"]["uid"]


def _kind(owner: Object) -> str:
    return "Job" if "backoffLimit" in owner["spec"] else "Deployment"


def _api_version(owner: Object) -> str:
    return "batch/v1" if _kind(owner) == "Job" else "apps/v1"
