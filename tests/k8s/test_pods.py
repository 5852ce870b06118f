"""Every pod of every example: Pod Security `restricted`, resources, probes, images, environment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from tests.k8s.chart import Object, Pod, pod_of, pods, render, services_of

pytestmark = pytest.mark.k8s

VOLUME_KINDS = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
    "image",
}
"""Kinds that Pod Security `restricted` admits."""

COMMANDS = {"serve", "ppo", "sft", "reward-model", "demo", "fetch"}


def _containers(objects: list[Object]) -> Iterator[tuple[Pod, dict[str, Any], str]]:
    for pod in pods(objects):
        for container in pod.containers:
            yield pod, container, f"{pod.name}/{container['name']}"


def _main(pod: Pod) -> dict[str, Any]:
    """The container that does the pod's work; the others are beside it."""
    return pod.spec["containers"][0]


def test_pods_are_restricted(objects: list[Object]) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, line by line."""
    for pod in pods(objects):
        spec, context = pod.spec, pod.spec.get("securityContext", {})
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            assert not spec.get(key), f"{pod.name} {key}"
        assert context["runAsNonRoot"] is True, pod.name
        assert context["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost"), pod.name
        assert not {"sysctls", "windowsOptions"} & set(context), pod.name
        assert context.get("runAsUser") != 0, pod.name
        for volume in spec.get("volumes", []):
            kinds = set(volume) - {"name"}
            assert kinds <= VOLUME_KINDS, f"{pod.name} volume {volume['name']}: {kinds}"
        assert "ephemeralContainers" not in spec


def test_containers_are_restricted(objects: list[Object]) -> None:
    for _, container, name in _containers(objects):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["capabilities"]["drop"] == ["ALL"], name
        assert set(context["capabilities"].get("add", [])) <= {"NET_BIND_SERVICE"}, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert not context.get("privileged"), name
        assert context.get("runAsNonRoot", True) is True, name
        assert context.get("runAsUser") != 0, name
        assert context.get("procMount", "Default") == "Default", name
        profile = context.get("seccompProfile", {"type": "RuntimeDefault"})
        assert profile["type"] in ("RuntimeDefault", "Localhost"), name
        for port in container.get("ports", []):
            assert "hostPort" not in port, name


def test_images_are_of_one_version(objects: list[Object]) -> None:
    for _, container, name in _containers(objects):
        image = container["image"]
        tag = re.fullmatch(r"[^:@]+(:\d+/[^:@]+)?(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", image)
        assert tag, f"{name}: {image}"
        assert tag[2] or tag[3], f"{name}: {image} has neither a tag nor a digest"
        assert tag[2] not in (":latest", ":main", ":master"), f"{name}: {image}"
        assert container["imagePullPolicy"] in ("IfNotPresent", "Always", "Never"), name


def test_containers_state_what_they_need_and_may_use(objects: list[Object]) -> None:
    for _, container, name in _containers(objects):
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]), name
        assert "memory" in resources["limits"], name
        for gpu in {"nvidia.com/gpu", "amd.com/gpu"} & set(resources["limits"]):
            assert str(resources["limits"][gpu]).isdigit(), name


def test_servers_have_the_three_probes(objects: list[Object]) -> None:
    for pod in pods(objects):
        if not pod.is_server:
            continue
        container = _main(pod)
        health = pod.ports()["grpc-health"]
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container[kind]
            assert probe["grpc"]["port"] == health, f"{pod.name} {kind}"
            assert probe["timeoutSeconds"] >= 3, f"{pod.name} {kind}"
            assert not probe.get("initialDelaySeconds"), f"{pod.name} {kind}"
        assert container["startupProbe"]["grpc"]["service"] == "liveness", pod.name
        assert container["livenessProbe"]["grpc"]["service"] == "liveness", pod.name


@pytest.mark.parametrize("service", ["policy", "reward", "reference"])
def test_readiness_asks_for_the_services_of_the_pod(objects: list[Object], service: str) -> None:
    for pod in pods(objects):
        if not pod.is_server or service not in _main(pod)["args"]:
            continue
        names = [part for part in _main(pod)["args"][1:] if not part.startswith("/")]
        asked = _main(pod)["readinessProbe"]["grpc"].get("service", "")
        alone = f"kleash.{service}.v1.{service.capitalize()}Service"
        assert asked == (alone if len(names) == 1 else ""), pod.name


def test_a_model_has_half_an_hour_to_load(objects: list[Object]) -> None:
    for pod in pods(objects):
        if pod.is_server:
            probe = _main(pod)["startupProbe"]
            assert probe["periodSeconds"] * probe["failureThreshold"] >= 600, pod.name


def test_no_environment_variable_is_there_twice(objects: list[Object]) -> None:
    """A server-side apply, Helm 4's default, refuses them."""
    for _, container, name in _containers(objects):
        names = [entry["name"] for entry in container.get("env", [])]
        assert len(names) == len(set(names)), f"{name}: {sorted(names)}"


def test_no_secret_is_written_in_plain(objects: list[Object]) -> None:
    for item in objects:
        assert item["kind"] != "Secret", "secrets are the installer's: name an existing one"
    for _, container, name in _containers(objects):
        for entry in container.get("env", []):
            words = set(entry["name"].split("_"))
            # A *_FILE names a file and a *_CA, *_CERT or *_KEY of ours a path.
            if words & {"TOKEN", "PASSWORD", "SECRET"} and "FILE" not in words:
                assert "secretKeyRef" in entry.get("valueFrom", {}), f"{name} {entry['name']}"


def test_keys_of_model_sources_are_given_to_the_download_alone(objects: list[Object]) -> None:
    """A server that was broken into has no token of the model hub."""
    for pod in pods(objects):
        for container in pod.spec["containers"]:
            entries = [entry for entry in container.get("envFrom", []) if "secretRef" in entry]
            assert not entries, f"{pod.name}/{container['name']}"


def test_pods_have_accounts_of_their_own_and_no_links(objects: list[Object]) -> None:
    for pod in pods(objects):
        assert pod.spec.get("serviceAccountName", "default") != "default", pod.name
        assert pod.spec.get("enableServiceLinks") is False, (
            f"{pod.name} gets a variable for each Service of the namespace, KLEASH_... among them"
        )


def test_what_is_mounted_is_there(objects: list[Object]) -> None:
    for pod in pods(objects):
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        assert len(volumes) == len(pod.spec.get("volumes", [])), pod.name
        mounted: set[str] = set()
        for container in pod.containers:
            mounts = container.get("volumeMounts", [])
            paths = [mount["mountPath"] for mount in mounts]
            assert len(paths) == len(set(paths)), f"{pod.name}: two mounts at one path"
            mounted |= {mount["name"] for mount in mounts}
        assert mounted == volumes, f"{pod.name}: mounts and volumes differ"


def test_config_maps_that_pods_use_are_rendered(objects: list[Object]) -> None:
    config_maps = {
        item["metadata"]["name"]: set(item.get("data", {}))
        for item in objects
        if item["kind"] == "ConfigMap"
    }
    for pod in pods(objects):
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                used = volume["configMap"]
                keys = {entry["key"] for entry in used.get("items", [])}
                assert used["name"] in config_maps, f"{pod.name}: {used['name']}"
                assert keys <= config_maps[used["name"]], f"{pod.name}: {used['name']}"
                assert "checksum/config" in pod.annotations, (
                    f"{pod.name} would not be replaced when {used['name']} changes"
                )


def test_root_is_read_only_and_what_is_written_has_a_mount(objects: list[Object]) -> None:
    """The image's home, its caches and temporary files."""
    for pod, container, name in _containers(objects):
        writable = [
            mount["mountPath"]
            for mount in container.get("volumeMounts", [])
            if not mount.get("readOnly")
        ]
        assert "/tmp" in writable, name
        if not pod.is_test:
            assert "/cache" in writable, name
        for entry in container.get("env", []):
            if entry["name"] in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
                assert any(entry["value"].startswith(path) for path in writable), name


def test_scratch_space_is_bounded(objects: list[Object]) -> None:
    """An emptyDir without a limit fills the node."""
    for pod in pods(objects):
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume:
                assert volume["emptyDir"].get("sizeLimit"), f"{pod.name} {volume['name']}"


def test_containers_run_the_product_itself(objects: list[Object]) -> None:
    """No shell: the process gets SIGTERM, and the arguments are the documented ones."""
    for pod, container, name in _containers(objects):
        if pod.is_test:
            continue
        assert container.get("command", ["kleash"]) == ["kleash"], name
        assert container["args"][0] in COMMANDS, name


def test_pods_of_a_service_have_its_ports(objects: list[Object]) -> None:
    served = 0
    for pod in pods(objects):
        for service in services_of(objects, pod):
            for port in service["spec"]["ports"]:
                name = f"{service['metadata']['name']} {port['name']}"
                assert port["targetPort"] in pod.ports(), f"{name}: {pod.name} has no such port"
                assert port["name"] == port["targetPort"], name
                grpc = ("kubernetes.io/h2c", "grpc")
                expected = {"grpc": grpc, "weights": grpc, "http": ("http", "https")}
                assert port.get("appProtocol") in expected.get(port["name"], (None,)), name
                served += 1
    assert served > 0


def test_servers_listen_on_the_documented_ports(objects: list[Object]) -> None:
    for pod in pods(objects):
        expected = {"grpc": 50051, "grpc-health": 8081, "http-metrics": 9090}
        if pod.component == "trainer":
            expected["weights"] = 50061
        if pod.is_server or pod.component == "trainer":
            assert expected.items() <= pod.ports().items(), pod.name


HUB = "hf://org/name@0123456789abcdef0123456789abcdef01234567"
OTHER = "s3://bucket/other"
DIGEST = "0123456789abcdef" * 4


def _given(section: str, uri: str = HUB) -> tuple[str, ...]:
    """Settings of a model with everything that belongs to it."""
    model = f"{section}.model"
    return (
        f'{model}.uri="{uri}"',
        f'{model}.existingSecret="hub"',
        f'{model}.sha256="{DIGEST}"',
        f"{model}.waitSeconds=77",
    )


def _fetch(objects: list[Object], component: str, label: str) -> tuple[str | None, set[str]]:
    """Secret and arguments of the init container that brings a model."""
    (container,) = [
        container
        for container in pod_of(objects, component).spec["initContainers"]
        if container["name"] == f"fetch-{label}"
    ]
    secrets = [entry["secretRef"]["name"] for entry in container.get("envFrom", [])]
    return (secrets[0] if secrets else None), set(container["args"][1:])


@pytest.mark.parametrize(
    ("source", "component", "label", "section"),
    [
        ("policy", "reference", "reference", "reference.model"),
        ("policy", "trainer", "model", "trainer.model"),
        ("reward", "trainer", "reward-model", "trainer.rewardModel"),
    ],
)
def test_a_model_that_is_taken_over_comes_with_what_belongs_to_it(
    helm: object, source: str, component: str, label: str, section: str
) -> None:
    taken = {f"--sha256={DIGEST}", "--wait_s=77"}
    for settings in (_given(source), (*_given(source), f'{section}.uri="{HUB}"')):
        secret, arguments = _fetch(render(settings=settings), component, label)
        assert secret == "hub"
        assert arguments > {HUB, *taken}
    own = (f'{section}.existingSecret="mine"', f"{section}.waitSeconds=0")
    secret, arguments = _fetch(render(settings=(*_given(source), *own)), component, label)
    assert secret == "mine"
    assert arguments > {f"--sha256={DIGEST}", "--wait_s=0"}


def test_another_model_takes_over_nothing(helm: object) -> None:
    for component, label, section in (
        ("reference", "reference", "reference.model"),
        ("trainer", "model", "trainer.model"),
    ):
        items = render(settings=(*_given("policy"), f'{section}.uri="{OTHER}"'))
        secret, arguments = _fetch(items, component, label)
        assert secret is None
        assert arguments > {OTHER, "--wait_s=3600"}
        assert f"--sha256={DIGEST}" not in arguments
