"""Who may reach whom: the flows that a run needs are open, everything else is closed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.k8s.chart import NAMESPACE, Object, Pod, of_kind, pods, render, selects
from tests.k8s.netpol import Peer, is_allowed

pytestmark = pytest.mark.k8s

GRPC, HEALTH, METRICS, WEIGHTS, HTTP = 50051, 8081, 9090, 50061, 8080

DNS = Peer("dns", "kube-system", {"k8s-app": "kube-dns"}, address="10.244.0.2")
STRANGER = Peer("stranger", NAMESPACE, {"app": "stranger"}, address="10.244.0.40")
FOREIGNER = Peer("foreigner", "elsewhere", {"app": "foreigner"}, address="10.244.0.41")
IMPOSTOR = Peer(
    "impostor",
    "elsewhere",
    {
        "app.kubernetes.io/name": "kleash",
        "app.kubernetes.io/instance": "demo",
        "app.kubernetes.io/component": "trainer",
    },
    address="10.244.0.42",
)
PROMETHEUS = Peer("prometheus", "monitoring", {"app": "prometheus"}, address="10.244.0.43")
API_SERVER = Peer("api-server", address="192.168.10.5")
INTERNET = Peer("internet", address="93.184.216.34")
OUTSIDERS = (STRANGER, FOREIGNER, IMPOSTOR, INTERNET)


def peer(pod: Pod, number: int = 0) -> Peer:
    """A pod of the release."""
    address = f"10.244.1.{10 + number}"
    return Peer(pod.name, NAMESPACE, pod.labels, {}, address, pod.ports())


def servers(objects: list[Object]) -> Iterator[tuple[str, Peer]]:
    """Component and peer of everything that listens."""
    for number, pod in enumerate(pods(objects)):
        if "grpc" in pod.ports():
            yield pod.component, peer(pod, number)


def find(objects: list[Object], service: str) -> Peer:
    """The pod that serves policy, reward or reference, also when it serves several."""
    for pod in pods(objects):
        if pod.is_server and service in pod.spec["containers"][0]["args"]:
            return peer(pod)
    raise AssertionError(f"nothing serves {service}")


def of_component(objects: list[Object], component: str) -> Peer:
    (found,) = [pod for pod in pods(objects) if pod.component == component and not pod.is_test]
    return peer(found, 20)


def has_trainer(objects: list[Object]) -> bool:
    return any(pod.component == "trainer" for pod in pods(objects))


def test_every_pod_has_a_policy_for_both_directions(objects: list[Object]) -> None:
    for pod in pods(objects):
        directions = {
            direction
            for policy in of_kind(objects, "NetworkPolicy")
            if selects(policy["spec"]["podSelector"], pod.labels)
            for direction in policy["spec"]["policyTypes"]
        }
        assert directions == {"Ingress", "Egress"}, pod.name


def test_no_policy_selects_pods_of_others(objects: list[Object]) -> None:
    """An empty selector would isolate every pod of the namespace."""
    for policy in of_kind(objects, "NetworkPolicy"):
        assert not selects(policy["spec"]["podSelector"], STRANGER.labels)


@pytest.mark.parametrize("service", ["policy", "reward", "reference"])
def test_the_trainer_reaches_the_services(objects: list[Object], service: str) -> None:
    if not has_trainer(objects):
        pytest.skip("this example has no trainer")
    trainer = of_component(objects, "trainer")
    assert is_allowed(objects, trainer, find(objects, service), GRPC)


def test_the_policy_fetches_weights_from_the_trainer_and_from_its_peers(
    objects: list[Object],
) -> None:
    policy = find(objects, "policy")
    assert is_allowed(objects, policy, policy, GRPC)
    if has_trainer(objects):
        assert is_allowed(objects, policy, of_component(objects, "trainer"), WEIGHTS)


def test_nobody_else_fetches_weights(objects: list[Object]) -> None:
    if not has_trainer(objects):
        pytest.skip("this example has no trainer")
    trainer = of_component(objects, "trainer")
    for outsider in OUTSIDERS:
        assert not is_allowed(objects, outsider, trainer, WEIGHTS), outsider.name
    for pod in pods(objects):
        if pod.is_server and "policy" not in pod.spec["containers"][0]["args"]:
            assert not is_allowed(objects, peer(pod), trainer, WEIGHTS), pod.name


def test_every_pod_that_uses_names_reaches_dns(objects: list[Object]) -> None:
    for pod in pods(objects):
        if pod.component in ("demo", "sft", "reward-model"):
            continue
        for protocol in ("UDP", "TCP"):
            assert is_allowed(objects, peer(pod), DNS, 53, protocol), pod.name


def test_helm_test_reaches_the_services(objects: list[Object]) -> None:
    """It scores and generates over gRPC, and that port serves health too."""
    tests = [peer(pod) for pod in pods(objects) if pod.is_test]
    assert tests
    for source in tests:
        for service in ("policy", "reward", "reference"):
            assert is_allowed(objects, source, find(objects, service), GRPC), service


def test_outsiders_reach_nothing(objects: list[Object]) -> None:
    for component, target in servers(objects):
        for outsider in OUTSIDERS:
            for port in (GRPC, HEALTH, METRICS, HTTP, 22):
                assert not is_allowed(objects, outsider, target, port), (
                    f"{outsider.name} reaches {component}:{port}"
                )


def test_prometheus_reads_metrics_and_nothing_else(objects: list[Object]) -> None:
    for component, target in servers(objects):
        assert is_allowed(objects, PROMETHEUS, target, METRICS), component
        assert not is_allowed(objects, PROMETHEUS, target, GRPC), component


def test_services_do_not_call_each_other(defaults: list[Object]) -> None:
    """A reward model that was broken into has nowhere to go."""
    for source in ("reward", "reference"):
        for target, end in servers(defaults):
            for port in (GRPC, WEIGHTS, METRICS):
                assert not is_allowed(defaults, find(defaults, source), end, port), (
                    f"{source} reaches {target}:{port}"
                )
    policy = find(defaults, "policy")
    assert not is_allowed(defaults, policy, find(defaults, "reward"), GRPC)
    assert not is_allowed(defaults, of_component(defaults, "demo"), policy, GRPC)


def test_only_the_trainer_asks_the_api_server(defaults: list[Object]) -> None:
    for pod in pods(defaults):
        expected = pod.component == "trainer" and not pod.is_test
        for port in (443, 6443):
            assert is_allowed(defaults, peer(pod), API_SERVER, port) is expected, pod.name


def test_services_that_review_tokens_ask_the_api_server(helm: object) -> None:
    items = render(settings=('auth.mode="serviceAccount"',))
    for service in ("policy", "reward", "reference"):
        assert is_allowed(items, find(items, service), API_SERVER, 443), service


def test_the_demo_needs_no_internet(defaults: list[Object]) -> None:
    for pod in pods(defaults):
        if pod.component != "trainer":
            for port in (80, 443):
                assert not is_allowed(defaults, peer(pod), INTERNET, port), pod.name
        assert not is_allowed(defaults, peer(pod), INTERNET, 80), pod.name


def test_models_from_the_hub_are_reached(helm: object) -> None:
    uri = "hf://org/name@0123456789abcdef0123456789abcdef01234567"
    items = render(settings=(f'reward.model.uri="{uri}"',))
    assert is_allowed(items, find(items, "reward"), INTERNET, 443)
    assert not is_allowed(items, find(items, "reference"), INTERNET, 443)


def test_other_applications_call_the_reward_service_alone(helm: object) -> None:
    client = '{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"elsewhere"}}}'
    items = render(settings=(f"networkPolicy.rewardClients=[{client}]",))
    for component, target in servers(items):
        assert is_allowed(items, FOREIGNER, target, GRPC) is (component == "reward"), component
        assert not is_allowed(items, FOREIGNER, target, METRICS), component
        assert not is_allowed(items, STRANGER, target, GRPC), component


@pytest.mark.parametrize("is_packed", [False, True])
def test_callers_of_the_http_port_call_that_alone(helm: object, is_packed: bool) -> None:
    client = '{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"elsewhere"}}}'
    settings = ("reward.http.enabled=true", f"packed.enabled={json.dumps(is_packed)}")
    both = render(settings=(*settings, f"networkPolicy.rewardClients=[{client}]"))
    web = render(settings=(*settings, f"networkPolicy.rewardHttpClients=[{client}]"))
    shut = render(settings=settings)
    for items, ports in ((both, {GRPC, HTTP}), (web, {HTTP}), (shut, set[int]())):
        reward = find(items, "reward")
        for component, target in servers(items):
            for port in (GRPC, HTTP, HEALTH, METRICS):
                is_open = target.name == reward.name and port in ports
                assert is_allowed(items, FOREIGNER, target, port) is is_open, (component, port)
                assert not is_allowed(items, STRANGER, target, port), (component, port)


def test_who_steers_the_trainer_does_so_on_both_of_its_ports(helm: object) -> None:
    client = '{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"elsewhere"}}}'
    named = f"networkPolicy.trainerClients=[{client}]"
    for settings, ports in (
        (("trainer.http.enabled=true", named), {GRPC, HTTP}),
        ((named,), {GRPC}),
        (("trainer.http.enabled=true",), set[int]()),
    ):
        items = render(settings=settings)
        for component, target in servers(items):
            for port in (GRPC, HTTP, WEIGHTS):
                is_open = component == "trainer" and port in ports
                assert is_allowed(items, FOREIGNER, target, port) is is_open, (component, port)


@pytest.mark.parametrize("service", ["policy", "reference"])
def test_a_trainer_of_another_release_calls_what_is_named(helm: object, service: str) -> None:
    client = '{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"elsewhere"}}}'
    items = render(settings=(f"networkPolicy.{service}Clients=[{client}]",))
    for component, target in servers(items):
        assert is_allowed(items, FOREIGNER, target, GRPC) is (component == service), component


@pytest.mark.parametrize("is_enabled", ["true", "false"])
def test_a_policy_outside_of_the_release_fetches_weights(helm: object, is_enabled: str) -> None:
    elsewhere = '{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"elsewhere"}}}'
    items = render(
        settings=(
            f"policy.enabled={is_enabled}",
            'trainer.config.services.policy=["policy.elsewhere.svc:50051"]',
            f'trainer.extraEgress=[{{"to":[{elsewhere}],"ports":[{{"port":50051}}]}}]',
            f"networkPolicy.weightsClients=[{elsewhere}]",
        )
    )
    trainer = of_component(items, "trainer")
    assert is_allowed(items, trainer, FOREIGNER, GRPC)
    assert is_allowed(items, FOREIGNER, trainer, WEIGHTS)
    assert not is_allowed(items, FOREIGNER, trainer, GRPC)
    assert not is_allowed(items, STRANGER, trainer, WEIGHTS)


def test_policies_can_be_left_out(helm: object) -> None:
    assert of_kind(render(settings=("networkPolicy.enabled=false",)), "NetworkPolicy") == []
