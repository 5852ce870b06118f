"""Services, rights, disruption budgets, autoscalers, sizes and rollout of every example."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.k8s.chart import (
    CHART,
    NAMESPACE,
    PREFIX,
    Object,
    Pod,
    name_of,
    of_kind,
    pod_of,
    pods,
    render,
    selects,
    services_of,
)

pytestmark = pytest.mark.k8s

GIB = 2**30
SERVICES = ("policy", "reward", "reference")

TRAINER_RULES = {
    ("discovery.k8s.io", "endpointslices", "get"),
    ("discovery.k8s.io", "endpointslices", "list"),
    ("discovery.k8s.io", "endpointslices", "watch"),
    ("coordination.k8s.io", "leases", "get"),
    ("coordination.k8s.io", "leases", "create"),
    ("coordination.k8s.io", "leases", "update"),
    ("events.k8s.io", "events", "create"),
    ("events.k8s.io", "events", "patch"),
}
"""All that the trainer may do at the Kubernetes API, as (group, resource, verb)."""


def quantity(value: str | float) -> float:
    """A Kubernetes quantity as a number: "500m" is 0.5, "1Gi" is 2**30."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": GIB}
    text = str(value)
    for unit in sorted(units, key=len, reverse=True):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * units[unit]
    return float(text)


def effective(pod: Pod, kind: str, resource: str) -> float:
    """What the scheduler counts for a pod: its containers, or its largest init container."""

    def of(container: dict[str, Any]) -> float:
        return quantity(container["resources"][kind].get(resource, 0))

    main = sum(of(container) for container in pod.spec["containers"])
    return max([main, *(of(container) for container in pod.spec.get("initContainers", []))])


def _rules(objects: list[Object], account: str) -> set[tuple[str, str, str]]:
    """Rights of a ServiceAccount by Roles, and by ClusterRoles with the prefix "cluster:"."""
    found: set[tuple[str, str, str]] = set()
    roles = {name_of(item): item for item in of_kind(objects, "Role", "ClusterRole")}
    for binding in of_kind(objects, "RoleBinding", "ClusterRoleBinding"):
        for subject in binding["subjects"]:
            if (subject["kind"], subject["name"]) != ("ServiceAccount", account):
                continue
            assert subject["namespace"] == NAMESPACE
            reference = binding["roleRef"]
            prefix = "cluster:" if binding["kind"] == "ClusterRoleBinding" else ""
            for rule in roles[f"{reference['kind']}/{reference['name']}"]["rules"]:
                found |= {
                    (group, prefix + resource, verb)
                    for group in rule["apiGroups"]
                    for resource in rule["resources"]
                    for verb in rule["verbs"]
                }
    return found


def test_accounts_have_the_rights_they_need_and_no_other(objects: list[Object]) -> None:
    for pod in pods(objects):
        rules = _rules(objects, pod.spec["serviceAccountName"])
        token_review = {("authentication.k8s.io", "cluster:tokenreviews", "create")}
        if pod.component == "trainer":
            assert rules - token_review == TRAINER_RULES, pod.name
        else:
            assert rules <= token_review, pod.name


def test_pods_that_ask_the_api_server_have_a_token_and_no_other(objects: list[Object]) -> None:
    for pod in pods(objects):
        has_rights = bool(_rules(objects, pod.spec["serviceAccountName"]))
        assert pod.spec["automountServiceAccountToken"] is has_rights, pod.name


def test_rights_name_no_wildcard_and_are_bound_once(objects: list[Object]) -> None:
    for role in of_kind(objects, "Role", "ClusterRole"):
        for rule in role["rules"]:
            values = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in values, name_of(role)
    bound = {
        f"{item['roleRef']['kind']}/{item['roleRef']['name']}"
        for item in of_kind(objects, "RoleBinding", "ClusterRoleBinding")
    }
    assert {name_of(item) for item in of_kind(objects, "Role", "ClusterRole")} == bound


def test_only_reviewing_tokens_needs_a_right_on_the_cluster(defaults: list[Object]) -> None:
    assert not of_kind(defaults, "ClusterRole", "ClusterRoleBinding")
    reviewing = render(settings=('auth.mode="serviceAccount"',))
    (role,) = of_kind(reviewing, "ClusterRole")
    expected = {
        "apiGroups": ["authentication.k8s.io"],
        "resources": ["tokenreviews"],
        "verbs": ["create"],
    }
    assert role["rules"] == [expected]


def test_the_trainer_may_change_its_own_lease_alone(defaults: list[Object]) -> None:
    (role,) = of_kind(defaults, "Role")
    for rule in role["rules"]:
        if "leases" in rule["resources"] and rule["verbs"] != ["create"]:
            assert rule["resourceNames"] == [f"{PREFIX}-trainer"]


def test_accounts_are_rendered_and_mount_no_token_by_themselves(objects: list[Object]) -> None:
    accounts = {item["metadata"]["name"]: item for item in of_kind(objects, "ServiceAccount")}
    used = {pod.spec["serviceAccountName"] for pod in pods(objects)}
    assert used == set(accounts)
    for name, account in accounts.items():
        assert account["automountServiceAccountToken"] is False, name


def test_every_service_has_pods(objects: list[Object]) -> None:
    for service in of_kind(objects, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        chosen = [pod for pod in pods(objects) if selects(selector, pod.labels)]
        components = {pod.component for pod in chosen}
        assert len(components) == 1, f"{name_of(service)} selects {components}"
        assert not [pod for pod in chosen if pod.is_test], f"{name_of(service)} selects a test"


@pytest.mark.parametrize("component", SERVICES)
def test_headless_services_show_replicas_that_are_not_ready(
    defaults: list[Object], component: str
) -> None:
    """A policy replica is not ready before the trainer, who has to find it, has published."""
    services = {
        item["metadata"]["name"]: item["spec"]
        for item in services_of(defaults, pod_of(defaults, component))
    }
    assert set(services) == {f"{PREFIX}-{component}", f"{PREFIX}-{component}-headless"}
    headless = services[f"{PREFIX}-{component}-headless"]
    assert headless["clusterIP"] == "None"
    assert headless["publishNotReadyAddresses"] is (component == "policy") or (
        headless["publishNotReadyAddresses"] is True
    )
    ordinary = services[f"{PREFIX}-{component}"]
    assert ordinary.get("clusterIP") is None
    assert not ordinary.get("publishNotReadyAddresses")


def test_workloads_select_their_own_pods_by_labels_that_never_change(
    objects: list[Object],
) -> None:
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        selector = item["spec"]["selector"]
        assert selects(selector, item["spec"]["template"]["metadata"]["labels"]), name_of(item)
        assert set(selector["matchLabels"]) == {
            "app.kubernetes.io/name",
            "app.kubernetes.io/instance",
            "app.kubernetes.io/component",
        }, name_of(item)
    for item in of_kind(objects, "StatefulSet"):
        names = {service["metadata"]["name"] for service in of_kind(objects, "Service")}
        assert item["spec"]["serviceName"] in names


def test_what_is_autoscaled_leaves_the_number_to_the_autoscaler(objects: list[Object]) -> None:
    scaled = {
        f"{item['spec']['scaleTargetRef']['kind']}/{item['spec']['scaleTargetRef']['name']}"
        for item in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
    }
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        assert ("replicas" in item["spec"]) is (name_of(item) not in scaled), name_of(item)
    assert scaled <= {name_of(item) for item in of_kind(objects, "Deployment", "StatefulSet")}


def test_keda_scales_on_the_tokens_that_wait(helm: object) -> None:
    scaled = of_kind(render(CHART / "ci" / "keda-values.yaml"), "ScaledObject")
    assert scaled
    for item in scaled:
        (trigger,) = item["spec"]["triggers"]
        assert trigger["type"] == "prometheus"
        assert trigger["metadata"]["serverAddress"].startswith("http")
        assert trigger["metadata"]["query"].startswith("sum(kleash_queue_"), trigger
        assert item["spec"]["minReplicaCount"] >= 1, "a cold start takes minutes"
        assert item["spec"]["maxReplicaCount"] > item["spec"]["minReplicaCount"]


def test_a_disruption_budget_never_blocks_the_drain_of_a_node(objects: list[Object]) -> None:
    """minAvailable 1 of one replica would: budgets are for several."""
    workloads = of_kind(objects, "Deployment", "StatefulSet")
    floors = {
        f"{item['spec']['scaleTargetRef']['kind']}/{item['spec']['scaleTargetRef']['name']}": (
            item["spec"].get("minReplicas") or item["spec"].get("minReplicaCount")
        )
        for item in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
    }
    for item in workloads:
        labels = item["spec"]["template"]["metadata"]["labels"]
        budgets = [
            budget
            for budget in of_kind(objects, "PodDisruptionBudget")
            if selects(budget["spec"]["selector"], labels)
        ]
        floor = floors.get(name_of(item), item["spec"].get("replicas", 1))
        if floor <= 1:
            assert not [one for one in budgets if one["spec"].get("minAvailable")], name_of(item)
        else:
            assert len(budgets) == 1, name_of(item)
            available = budgets[0]["spec"].get("minAvailable", 0)
            assert budgets[0]["spec"].get("maxUnavailable", 0) >= 1 or available < floor


def test_budgets_come_with_the_second_replica(helm: object) -> None:
    assert not of_kind(render(), "PodDisruptionBudget")
    (budget,) = of_kind(render(settings=("reward.replicas=3",)), "PodDisruptionBudget")
    assert budget["metadata"]["name"] == f"{PREFIX}-reward"


@pytest.mark.parametrize(
    ("settings", "is_several"),
    [
        ((), False),
        (("reward.replicas=2",), True),
        (("reward.replicas=null",), True),
        (("reward.autoscaling.enabled=true",), True),
        (("reward.autoscaling.enabled=true", "reward.autoscaling.maxReplicas=1"), False),
    ],
)
def test_what_may_become_several_pods_is_treated_as_several(
    helm: object, settings: tuple[str, ...], is_several: bool
) -> None:
    """The number is an autoscaler's, or somebody else's where replicas is null."""
    items = render(settings=(*settings, "reward.gpu.count=1"))
    (reward,) = [item for item in of_kind(items, "Deployment") if name_of(item).endswith("-reward")]
    expected = "RollingUpdate" if is_several else "Recreate"
    assert reward["spec"]["strategy"]["type"] == expected
    assert bool(of_kind(items, "PodDisruptionBudget")) is is_several


def _drain(objects: list[Object], pod: Pod) -> dict[str, float]:
    """The server section of a pod's serve.json or ppo.json."""
    names = {
        volume["configMap"]["name"]
        for volume in pod.spec.get("volumes", [])
        if "configMap" in volume
    }
    for item in of_kind(objects, "ConfigMap"):
        for key, text in item.get("data", {}).items():
            if item["metadata"]["name"] in names and key in ("serve.json", "ppo.json"):
                return json.loads(text)["server"]
    raise AssertionError(f"{pod.name} has no configuration")


def test_a_pod_may_drain_before_it_is_killed(objects: list[Object]) -> None:
    for pod in pods(objects):
        if not pod.is_server:
            continue
        server = _drain(objects, pod)
        waits = server["drain_announce_s"] + server["drain_delay_s"]
        needed = waits + server["drain_grace_s"]
        assert pod.spec["terminationGracePeriodSeconds"] > needed, pod.name
        assert server["drain_grace_s"] >= server["max_request_s"], (
            f"{pod.name} breaks off calls that are within their deadline"
        )
        assert server["drain_announce_s"] >= 5, f"{pod.name} leaves balancers no time"


def test_a_rollout_waits_for_the_start_of_a_model(objects: list[Object]) -> None:
    for item in of_kind(objects, "Deployment"):
        probe = item["spec"]["template"]["spec"]["containers"][0]["startupProbe"]
        budget = probe["periodSeconds"] * probe["failureThreshold"]
        assert item["spec"]["progressDeadlineSeconds"] > budget, name_of(item)


def test_a_rollout_needs_no_gpu_that_is_not_there(helm: object) -> None:
    items = render(CHART / "ci" / "gpu-values.yaml")
    for item in of_kind(items, "Deployment"):
        limits = item["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        if "nvidia.com/gpu" not in limits:
            continue
        strategy = item["spec"]["strategy"]
        is_recreated = strategy["type"] == "Recreate"
        assert is_recreated or strategy["rollingUpdate"]["maxSurge"] == 0, name_of(item)


def test_the_demo_fits_a_laptop(defaults: list[Object]) -> None:
    """Two cores and 6 GiB, of which the cluster's own pods need some."""
    everyone = list(pods(defaults))
    assert sum(effective(pod, "requests", "cpu") for pod in everyone) <= 1.6
    assert sum(effective(pod, "requests", "memory") for pod in everyone) <= 6 * GIB
    replicas = {pod.name: pod.owner["spec"].get("replicas", 1) for pod in everyone}
    steady = [pod for pod in everyone if pod.component in (*SERVICES, "trainer")]
    limits = sum(effective(pod, "limits", "memory") * replicas[pod.name] for pod in steady)
    assert limits <= 6 * GIB


def test_pods_that_share_a_cpu_do_not_starve(defaults: list[Object]) -> None:
    """A CPU limit would stretch the demo's minutes; memory is what must be bounded."""
    for pod in pods(defaults):
        for container in pod.spec["containers"]:
            limit = container["resources"]["limits"].get("cpu")
            assert limit is None or quantity(limit) >= 1, pod.name


def test_claims_are_kept_when_the_release_goes(objects: list[Object]) -> None:
    """`helm uninstall` must not take the checkpoints along."""
    for claim in of_kind(objects, "PersistentVolumeClaim"):
        if claim["metadata"]["name"] == f"{PREFIX}-runs":
            assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_jobs_end_and_say_why(objects: list[Object]) -> None:
    for job in of_kind(objects, "Job"):
        spec = job["spec"]
        assert spec["backoffLimit"] >= 1, name_of(job)
        assert spec["template"]["spec"]["restartPolicy"] in ("Never", "OnFailure"), name_of(job)
        if "podFailurePolicy" in spec:
            assert spec["template"]["spec"]["restartPolicy"] == "Never", name_of(job)
            assert {rule["action"] for rule in spec["podFailurePolicy"]["rules"]} <= {
                "Ignore",
                "FailJob",
                "Count",
            }


def test_the_trainer_is_fenced_from_a_second_one(defaults: list[Object]) -> None:
    trainer = pod_of(defaults, "trainer")
    assert trainer.owner["kind"] == "Job"
    assert trainer.owner["spec"].get("parallelism", 1) == 1
    environment = {entry["name"]: entry for entry in trainer.spec["containers"][0]["env"]}
    for name, path in (("POD_NAME", "metadata.name"), ("POD_NAMESPACE", "metadata.namespace")):
        assert environment[name]["valueFrom"]["fieldRef"]["fieldPath"] == path


def test_kueue_admits_jobs_by_a_label_alone(helm: object) -> None:
    jobs = {pod.component: pod for pod in pods(render(CHART / "ci" / "kueue-values.yaml"))}
    labels = jobs["trainer"].owner["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"]
    assert not {"kueue.x-k8s.io/queue-name"} & set(jobs["policy"].owner["metadata"]["labels"])


def test_helm_test_is_a_hook_that_leaves_when_it_passed(defaults: list[Object]) -> None:
    tests = [pod for pod in pods(defaults) if pod.is_test]
    assert tests
    for pod in tests:
        annotations = pod.owner["metadata"]["annotations"]
        assert annotations["helm.sh/hook"] == "test"
        assert "before-hook-creation" in annotations["helm.sh/hook-delete-policy"]
        assert pod.spec["restartPolicy"] == "Never"
