"""A namespace in which runs of ``kleash k8s`` are played: callers, controllers, a small chart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.k8s.api_server import ApiServer
from tests.k8s.controllers import Controllers

from kleash.cluster.objects import JOB, Objects, name_of
from kleash.cluster.pipeline import Driver
from kleash.cluster.run_record import RunRecord, create_record, require_run
from kleash.cluster.stage_view import StageView
from kleash.cluster.stages import Stage, split

JOB_STAGES = ("demo", "sft", "reward-model", "ppo")
COMPONENT_OF = {"demo": "demo", "sft": "sft", "reward-model": "reward-model", "ppo": "trainer"}
EVERYTHING = ["get", "list", "create", "patch", "delete"]


class Crash(Exception):
    """The caller dies here."""


@dataclass
class Notebook:
    """Implements Display: what a caller was told."""

    notes: list[str] = field(default_factory=list)
    views: list[StageView] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def show(self, view: StageView) -> None:
        self.views.append(view)

    def log(self, title: str, text: str) -> None:
        self.logs.append(text)


def labels(component: str, run_id: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "kleash",
        "app.kubernetes.io/instance": run_id,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/managed-by": "Helm",
    }


def pod_template(component: str, run_id: str, *arguments: str) -> dict[str, Any]:
    container = {"name": "kleash", "image": "example.org/kleash:1", "args": list(arguments)}
    return {
        "metadata": {"labels": labels(component, run_id)},
        "spec": {"restartPolicy": "Always", "containers": [container]},
    }


def job(component: str, run_id: str, *arguments: str) -> dict[str, Any]:
    template = pod_template(component, run_id, *arguments)
    template["spec"]["restartPolicy"] = "Never"
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{run_id}-{component}", "labels": labels(component, run_id)},
        "spec": {"backoffLimit": 0, "ttlSecondsAfterFinished": 60, "template": template},
    }


def deployment(component: str, run_id: str) -> dict[str, Any]:
    chosen = labels(component, run_id)
    chosen.pop("app.kubernetes.io/managed-by")
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{run_id}-{component}", "labels": labels(component, run_id)},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": chosen},
            "template": pod_template(component, run_id, "serve", component, "serve.json"),
        },
    }


def small_chart(run_id: str) -> list[dict[str, Any]]:
    """Objects of the kinds that the chart has, small enough to see through."""
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": f"{run_id}-runs", "labels": labels("runs", run_id)},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{run_id}-policy", "labels": labels("policy", run_id)},
        "spec": {"clusterIP": "None", "ports": [{"port": 50051, "name": "grpc"}]},
    }
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{run_id}-sft", "labels": labels("sft", run_id)},
        "data": {"sft.json": "{}"},
    }
    return [
        *(job(COMPONENT_OF[stage], run_id, stage) for stage in reversed(JOB_STAGES)),
        *(deployment(each, run_id) for each in ("policy", "reward", "reference")),
        settings,
        service,
        claim,
    ]


@dataclass
class Cluster:
    """A namespace with its controllers, and callers as they come and go."""

    objects: Objects
    controllers: Controllers
    notebook: Notebook = field(default_factory=Notebook)

    @property
    def namespace(self) -> str:
        return self.objects.namespace

    def manifests(self, run_id: str) -> dict[Stage, list[dict[str, Any]]]:
        return split(small_chart(run_id), run_id=run_id)

    def begin(self, run_id: str = "alpha") -> Driver:
        """The record of a new run and its first caller."""
        create_record(self.objects, RunRecord(run_id, "alpha"))
        return self.caller(run_id)

    def caller(self, run_id: str = "alpha", **changes: Any) -> Driver:
        """Another caller of a run; while it sleeps the cluster works."""
        arguments: dict[str, Any] = {
            "objects": self.objects,
            "record": require_run(self.objects, run_id),
            "manifests": self.manifests(run_id),
            "display": self.notebook,
            "again": "kleash k8s run pipeline.toml",
            "sleep": lambda _: self.controllers.step(),
        }
        return Driver(**{**arguments, **changes})

    def begin_and_die(self, condition: Callable[[], bool]) -> None:
        """The record of a new run, whose first caller dies once something is so."""
        driver = self.begin()

        def die() -> None:
            if condition():
                raise Crash

        self.controllers.on_step = die
        with pytest.raises(Crash):
            driver.run()
        self.controllers.on_step = lambda: None

    def record(self, run_id: str = "alpha") -> RunRecord:
        return require_run(self.objects, run_id)

    def job_uids(self) -> dict[str, str]:
        return {name_of(job): job["metadata"]["uid"] for job in self.objects.find(JOB)}

    def events(self) -> list[str]:
        """Reasons of the Events about runs, in their order."""
        items = self.controllers.items("/apis/events.k8s.io/v1", "events")
        mine = [each for each in items if each["regarding"]["name"].startswith("kleash-run-")]
        return [each["reason"] for each in sorted(mine, key=lambda its: its["eventTime"])]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Let the cluster work until something is so."""
        for _ in range(50):
            if condition():
                return
            self.controllers.step()
        raise AssertionError("it did not become so in 50 steps")


def names_of_everything(cluster: Cluster) -> set[str]:
    """Kind/name of what a run may leave behind, Events aside."""
    groups = {
        "/api/v1": ("configmaps", "pods", "services", "persistentvolumeclaims"),
        "/apis/batch/v1": ("jobs",),
        "/apis/apps/v1": ("deployments",),
        "/apis/coordination.k8s.io/v1": ("leases",),
    }
    return {
        f"{plural}/{item['metadata']['name']}"
        for group, plurals in groups.items()
        for plural in plurals
        for item in cluster.controllers.items(group, plural)
    }


@dataclass
class Account:
    """A ServiceAccount with a Role."""

    api: ApiServer
    namespace: str

    def may(self, *rules: tuple[str, str, list[str]]) -> Path:
        """Its kubeconfig, after it got these rights: (API group, resource, verbs)."""
        rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{self.namespace}"
        self.api.request(
            "POST",
            f"/api/v1/namespaces/{self.namespace}/serviceaccounts",
            {"metadata": {"name": "caller"}},
        )
        listed = [
            {"apiGroups": [group], "resources": [resource], "verbs": verbs}
            for group, resource, verbs in rules
        ]
        role = {"metadata": {"name": "caller"}, "rules": listed}
        self.api.request("POST", f"{rbac}/roles", role)
        binding = {
            "metadata": {"name": "caller"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "Role",
                "name": "caller",
            },
            "subjects": [{"kind": "ServiceAccount", "name": "caller", "namespace": self.namespace}],
        }
        self.api.request("POST", f"{rbac}/rolebindings", binding)
        return self.api.service_account_kubeconfig(self.namespace, "caller")
