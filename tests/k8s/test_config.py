"""What the chart writes is what the product reads: configuration files parse with its classes,
arguments name its commands, and every address is that of a Service that leads to an open port."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import socket
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import grpc
import pytest
from tests.k8s.chart import NAMESPACE, Object, Pod, name_of, of_kind, pods, render, services_of
from tests.k8s.netpol import Peer, is_allowed

from kleash.base.config import Config
from kleash.cli.main import COMMANDS
from kleash.demo.pipeline import DemoConfig
from kleash.ppo.config import PPOConfig
from kleash.reward_model.config import RewardModelConfig
from kleash.rpc.ports import bind, serve_metrics
from kleash.sft.config import SFTConfig
from kleash.up.config import SERVICES, ServeConfig

pytestmark = pytest.mark.k8s

CONFIGS: dict[str, type[Config]] = {
    "serve.json": ServeConfig,
    "ppo.json": PPOConfig,
    "sft.json": SFTConfig,
    "reward-model.json": RewardModelConfig,
    "demo.json": DemoConfig,
}
ADDRESS = re.compile(r"(?:dns:///)?([a-z0-9-]+)\.([a-z0-9-]+)\.svc(?:\.cluster\.local)?:(\d+)")


def configs(objects: list[Object]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """ConfigMap, key and content of every configuration file."""
    for item in of_kind(objects, "ConfigMap"):
        for key, text in item.get("data", {}).items():
            if key in CONFIGS:
                yield item["metadata"]["name"], key, json.loads(text)


def config_of(objects: list[Object], pod: Pod, key: str) -> dict[str, Any]:
    """The file that a pod mounts."""
    names = {
        volume["configMap"]["name"]
        for volume in pod.spec.get("volumes", [])
        if "configMap" in volume
    }
    (found,) = [
        tree for name, found_key, tree in configs(objects) if name in names and found_key == key
    ]
    return found


def mounted_file(objects: list[Object], pod: Pod, path: str) -> str | None:
    """The ConfigMap's text that a pod's first container sees at ``path``."""
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    maps = {item["metadata"]["name"]: item["data"] for item in of_kind(objects, "ConfigMap")}
    for mount in pod.spec["containers"][0].get("volumeMounts", []):
        volume = volumes[mount["name"]]
        if "configMap" not in volume:
            continue
        data = maps[volume["configMap"]["name"]]
        items = volume["configMap"].get("items") or [{"key": key, "path": key} for key in data]
        for item in items:
            base = PurePosixPath(mount["mountPath"])
            place = base if mount.get("subPath") == item["path"] else base / item["path"]
            if str(place) == path:
                return data[item["key"]]
    return None


def texts(tree: Any) -> Iterator[str]:
    """Every string in a configuration."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from texts(value)
    elif isinstance(tree, str):
        yield tree


def test_configuration_is_what_the_product_reads(objects: list[Object]) -> None:
    found = list(configs(objects))
    assert found
    for name, key, tree in found:
        config = CONFIGS[key].model_validate(tree)
        assert config, f"{name} {key}"


def test_arguments_name_commands_and_files_that_are_mounted(objects: list[Object]) -> None:
    for pod in pods(objects):
        for container in pod.containers:
            assert pod.is_test or container["args"][0] in COMMANDS, container["args"]
        arguments = pod.spec["containers"][0].get("args", [])
        for argument in arguments:
            if argument.endswith(".json"):
                text = mounted_file(objects, pod, argument)
                assert text is not None, f"{pod.name}: nothing is mounted at {argument}"
                CONFIGS[PurePosixPath(argument).name].model_validate(json.loads(text))
        if arguments[:1] == ["serve"]:
            names = arguments[1:-1]
            assert names, pod.name
            assert set(names) <= set(SERVICES), pod.name
            tree = config_of(objects, pod, "serve.json")
            assert set(names) == set(tree) - {"server"}, f"{pod.name}: other services configured"


def test_processes_listen_where_the_pod_says(objects: list[Object]) -> None:
    for pod in pods(objects):
        key = {"serve": "serve.json", "ppo": "ppo.json"}.get(pod.spec["containers"][0]["args"][0])
        if key is None or pod.is_test:
            continue
        tree = config_of(objects, pod, key)
        server, ports = tree["server"], pod.ports()
        assert server["host"] == "::", f"{pod.name}: not reached on a cluster of the other family"
        assert server["port"] == ports["grpc"], pod.name
        assert server["health_port"] == ports["grpc-health"], pod.name
        assert server["metrics_port"] == ports["http-metrics"], pod.name
        assert server.get("http_port") == ports.get("http"), pod.name
        if key == "ppo.json":
            store = tree["publish"]["server"]
            assert store["host"] == "::", pod.name
            assert store["port"] == ports["weights"], pod.name


def test_addresses_lead_to_pods_that_may_be_reached(objects: list[Object]) -> None:
    services = {item["metadata"]["name"]: item for item in of_kind(objects, "Service")}
    everyone = list(pods(objects))
    seen = 0
    for pod in everyone:
        if pod.spec["containers"][0].get("args", [""])[0] not in ("serve", "ppo"):
            continue
        key = "serve.json" if pod.is_server else "ppo.json"
        tree = config_of(objects, pod, key)
        for text in texts(tree):
            found = ADDRESS.fullmatch(text)
            assert found or ".svc" not in text, f"{pod.name}: {text}"
            if not found:
                continue
            seen += 1
            name, namespace, port = found[1], found[2], int(found[3])
            assert namespace == NAMESPACE, text
            assert name in services, f"{pod.name} calls {text}, and there is no such Service"
            ports = {entry["port"]: entry for entry in services[name]["spec"]["ports"]}
            assert port in ports, f"{pod.name} calls {text}"
            targets = [one for one in everyone if services[name] in services_of(objects, one)]
            for target in targets:
                number = target.ports()[ports[port]["targetPort"]]
                source = Peer(pod.name, NAMESPACE, pod.labels, ports=pod.ports())
                end = Peer(target.name, NAMESPACE, target.labels, ports=target.ports())
                if target != pod:
                    assert is_allowed(objects, source, end, number), f"{pod.name} -> {text}"
    assert seen > 0


def _trainer(objects: list[Object]) -> tuple[Pod, dict[str, Any]]:
    for pod in pods(objects):
        if pod.component == "trainer":
            return pod, config_of(objects, pod, "ppo.json")
    pytest.skip("this example has no trainer")


def test_the_trainer_goes_on_where_it_was(objects: list[Object]) -> None:
    pod, tree = _trainer(objects)
    assert tree["resume"] is True
    assert tree["run_id"] == pod.labels["kleash.dev/run"]
    assert tree["out"] == f"/runs/{tree['run_id']}/ppo"
    (mount,) = [
        mount
        for mount in pod.spec["containers"][0]["volumeMounts"]
        if mount["mountPath"] == "/runs"
    ]
    (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"]]
    assert volume["persistentVolumeClaim"]["claimName"]


def test_the_trainer_finds_replicas_and_holds_the_lease(objects: list[Object]) -> None:
    _, tree = _trainer(objects)
    assert tree["services"]["discovery"] == "endpoint_slices"
    assert tree["services"]["policy"][0].partition(".")[0].endswith("-policy-headless")
    assert tree["services"]["wait_s"] >= 900
    assert tree["publish"]["lease"], "two trainers could publish to one fleet"
    assert ADDRESS.fullmatch(tree["publish"]["address"])


def test_policies_know_their_publisher(defaults: list[Object]) -> None:
    _, trainer = _trainer(defaults)
    (policy,) = [pod for pod in pods(defaults) if pod.component == "policy"]
    publisher = config_of(defaults, policy, "serve.json")["policy"]["weights"]["publisher"]
    assert publisher == trainer["publish"]["address"]


def test_models_are_in_a_folder_that_is_mounted(objects: list[Object]) -> None:
    for pod in pods(objects):
        mounts = [mount["mountPath"] for mount in pod.spec["containers"][0]["volumeMounts"]]
        for name, key, tree in configs(objects):
            used = {
                volume["configMap"]["name"]
                for volume in pod.spec["volumes"]
                if "configMap" in volume
            }
            if name not in used:
                continue
            sections = (
                [tree[one] for one in SERVICES if one in tree] if key == "serve.json" else [tree]
            )
            for section in sections:
                for folder in _folders(section):
                    assert any(PurePosixPath(folder).is_relative_to(mount) for mount in mounts), (
                        f"{pod.name}: {folder} is below none of {mounts}"
                    )


def _folders(section: dict[str, Any]) -> Iterator[str]:
    """Folders that a section of a configuration names, those of reward models by name included."""
    for one in (section, *section.get("models", {}).values()):
        found = [one.get("model"), one.get("reward_model")]
        found += [*one.get("function_path", ()), *one.get("model_folders", ())]
        yield from (path for path in found if isinstance(path, str) and path.startswith("/"))


def test_values_of_the_processes_reach_them(helm: object) -> None:
    """`config` of a component is merged over what the chart sets; a typo there fails in the
    process, with its own message."""
    items = render(settings=('trainer.config={"kl":{"coefficient":0.125}}',))
    _, tree = _trainer(items)
    assert tree["kl"]["coefficient"] == 0.125
    assert tree["publish"]["lease"], "the override replaced what it should have been merged with"


def test_config_maps_hold_no_credentials(objects: list[Object]) -> None:
    for item in of_kind(objects, "ConfigMap"):
        for key, text in item.get("data", {}).items():
            assert not re.search(r"hf_[A-Za-z0-9]{20}|BEGIN [A-Z ]*PRIVATE KEY", text), (
                f"{name_of(item)} {key}"
            )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class _WithoutIPv6(socket.socket):
    """Sockets of a kernel that was started without IPv6."""

    def __init__(self, family: int = -1, *arguments: Any, **options: Any) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        super().__init__(family, *arguments, **options)


@pytest.mark.parametrize("has_ipv6", [True, False])
def test_the_host_of_the_chart_is_reached_on_every_kind_of_cluster(
    monkeypatch: pytest.MonkeyPatch, has_ipv6: bool
) -> None:
    """Pods of IPv4 alone, of IPv6 alone and of both, and nodes whose kernel has no IPv6."""
    if not has_ipv6:
        monkeypatch.setattr(socket, "socket", _WithoutIPv6)
    elif not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    addresses = ("127.0.0.1", "::1") if has_ipv6 else ("127.0.0.1",)

    async def grpc_port_answers() -> None:
        server = grpc.aio.server()
        port = bind(server, "::", 0, None, key="server.port")
        await server.start()
        try:
            for address in addresses:
                socket.create_connection((address, port), timeout=5).close()
        finally:
            await server.stop(None)

    asyncio.run(grpc_port_answers())
    page = _free_port()
    end = serve_metrics("::", page)
    assert end is not None
    try:
        for address in addresses:
            socket.create_connection((address, page), timeout=5).close()
    finally:
        end()
