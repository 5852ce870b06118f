"""HTTP ports, reward models by name, quotas and audit lines: from the values to the processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.k8s.chart import CHART, PREFIX, Object, name_of, of_kind, pod_of, render, services_of
from tests.k8s.test_config import config_of

from kleash.reward.config import RewardConfig
from kleash.reward.http import API
from kleash.rpc.quota import DEFAULT_QUOTAS, Quotas
from kleash.rpc.server import ServerConfig

pytestmark = pytest.mark.k8s

PRODUCT = CHART / "ci" / "reward-product-values.yaml"
HTTP = "reward.http.enabled=true"
GATEWAY = 'reward.http.route.parentRefs=[{"name":"gateway"}]'
INGRESS = "reward.http.ingress.enabled=true"
OPEN_PATHS = {"/healthz", "/readyz", "/openapi.json", "/docs"}


def serve_config(items: list[Object], component: str = "reward") -> dict[str, Any]:
    """serve.json of a component's pods."""
    return config_of(items, pod_of(items, component), "serve.json")


def server_of(items: list[Object], component: str = "reward") -> ServerConfig:
    """The server's part of it, as the process reads it."""
    tree = serve_config(items, component)["server"]
    return ServerConfig.model_validate({**tree, "auth": {}, "tls": {}})


def by_name(items: list[Object], name: str) -> Object:
    (found,) = [item for item in items if name_of(item) == name]
    return found


def test_the_http_port_is_shut_until_it_is_asked_for(defaults: list[Object]) -> None:
    assert "http" not in pod_of(defaults, "reward").ports()
    assert server_of(defaults).http_port == 0
    assert not of_kind(defaults, "HTTPRoute", "Ingress")


@pytest.mark.parametrize(("tls", "protocol"), [((), "http"), (("auth.tls.enabled=true",), "https")])
@pytest.mark.parametrize("packed", [(), ("packed.enabled=true",)])
def test_the_service_leads_to_the_http_port(
    helm: object, tls: tuple[str, ...], protocol: str, packed: tuple[str, ...]
) -> None:
    certificates = ('auth.tls.existingSecret="tls"', 'auth.tls.serverName="reward.example"')
    items = render(settings=(HTTP, *packed, *tls, *(certificates if tls else ())))
    pod = pod_of(items, "packed" if packed else "reward")
    assert pod.ports()["http"] == 8080
    assert serve_config(items, pod.component)["server"]["http_port"] == 8080
    assert ("tls" in serve_config(items, pod.component)["server"]) is bool(tls)
    offered = {
        service["metadata"]["name"]: {port["name"]: port for port in service["spec"]["ports"]}
        for service in services_of(items, pod)
    }
    assert offered[f"{PREFIX}-reward"]["http"] == {
        "name": "http",
        "port": 8080,
        "targetPort": "http",
        "protocol": "TCP",
        "appProtocol": protocol,
    }
    others = {name for name, ports in offered.items() if "http" in ports} - {f"{PREFIX}-reward"}
    assert others == set(), "clients of these would be refused"


def test_the_trainer_has_an_http_port_of_its_own(helm: object) -> None:
    items = render(settings=("trainer.http.enabled=true",))
    pod = pod_of(items, "trainer")
    assert pod.ports()["http"] == 8080
    assert config_of(items, pod, "ppo.json")["server"]["http_port"] == 8080
    assert "http_port" not in config_of(items, pod, "ppo.json")["publish"]["server"]
    (service,) = services_of(items, pod)
    (port,) = [port for port in service["spec"]["ports"] if port["name"] == "http"]
    assert (port["port"], port["appProtocol"]) == (8080, "http")
    assert "http" not in pod_of(items, "reward").ports()


def test_what_leads_there_from_outside_leads_to_every_path(helm: object) -> None:
    """Those of the API as the service registers them, and what the port has for everybody."""
    settings = (HTTP, "reward.http.route.enabled=true", GATEWAY, INGRESS)
    items = render(settings=settings)
    paths = OPEN_PATHS | {route.path for route in API.routes}
    assert "/v1/score" in paths
    route = by_name(items, f"HTTPRoute/{PREFIX}-reward-http")["spec"]
    (rule,) = route["rules"]
    matches = [(match["path"]["type"], match["path"]["value"]) for match in rule["matches"]]
    assert rule["backendRefs"] == [{"name": f"{PREFIX}-reward", "port": 8080}]
    (host,) = by_name(items, f"Ingress/{PREFIX}-reward-http")["spec"]["rules"]
    entries = host["http"]["paths"]
    kinds = {"Prefix": "PathPrefix", "Exact": "Exact"}
    assert [(kinds[entry["pathType"]], entry["path"]) for entry in entries] == matches
    for entry in entries:
        port = {"name": f"{PREFIX}-reward", "port": {"name": "http"}}
        assert entry["backend"]["service"] == port
    for path in paths:
        assert any(
            path == value or (kind == "PathPrefix" and path.startswith(f"{value}/"))
            for kind, value in matches
        ), path


def test_an_ingress_shows_its_certificate_for_its_hosts(helm: object) -> None:
    settings = ('reward.http.ingress.hostnames=["a.example"]', 'reward.http.ingress.tlsSecret="s"')
    items = render(settings=(HTTP, INGRESS, *settings, 'reward.http.ingress.className="nginx"'))
    spec = by_name(items, f"Ingress/{PREFIX}-reward-http")["spec"]
    assert spec["ingressClassName"] == "nginx"
    assert spec["tls"] == [{"secretName": "s", "hosts": ["a.example"]}]
    assert [rule["host"] for rule in spec["rules"]] == ["a.example"]
    every = by_name(render(settings=(HTTP, INGRESS)), f"Ingress/{PREFIX}-reward-http")["spec"]
    assert "tls" not in every
    assert "host" not in every["rules"][0]


def test_certificates_hold_the_hosts_by_which_the_http_port_is_reached(helm: object) -> None:
    settings = (
        "auth.tls.enabled=true",
        'auth.tls.certManager.issuerRef.name="ca"',
        'reward.http.route.hostnames=["route.example"]',
        'reward.http.ingress.hostnames=["ingress.example"]',
    )
    items = render(settings=(HTTP, *settings))
    hosts = by_name(items, f"Certificate/{PREFIX}-reward")["spec"]["dnsNames"]
    assert {"route.example", "ingress.example"} <= set(hosts)


def test_models_by_name_are_served_and_brought(helm: object) -> None:
    items = render(PRODUCT)
    reward = RewardConfig.model_validate(serve_config(items)["reward"])
    assert reward.default_name == "judge"
    kinds = {name: entry.kind for name, entry in reward.entries().items()}
    assert kinds == {"judge": "model", "brevity": "function", "panel": "ensemble"}
    pod = pod_of(items, "reward")
    brought = [one["name"] for one in pod.containers if one["name"].startswith("fetch-")]
    assert brought == ["fetch-reward-judge"]
    trainer = config_of(items, pod_of(items, "trainer"), "ppo.json")
    assert trainer["reward_model"] == str(reward.models["judge"].model)


HUB = "hf://example-org/reward@0123456789abcdef0123456789abcdef01234567"


def with_models(**models: dict[str, Any]) -> list[Object]:
    """A release that serves them, and the one named own for calls that name none."""
    models["own"] = {"uri": "demo://reward-model"}
    given = f"reward.models={json.dumps(models)}"
    return render(settings=('reward.model.uri=""', given, 'reward.default="own"'))


def fetches_of(items: list[Object]) -> dict[str, dict[str, Any]]:
    """Init containers of the reward service that bring a model, by name."""
    containers = pod_of(items, "reward").containers
    return {one["name"]: one for one in containers if one["name"].startswith("fetch-")}


def test_each_named_model_is_fetched_with_its_own_secret_and_hash(helm: object) -> None:
    sha256 = "0123456789abcdef" * 4
    hub = {"uri": HUB, "existingSecret": "hub-token", "sha256": sha256, "waitSeconds": 7200}
    items = with_models(hub=hub)
    assert set(fetches_of(items)) == {"fetch-reward-hub", "fetch-reward-own"}
    fetch = fetches_of(items)["fetch-reward-hub"]
    assert HUB in fetch["args"]
    assert f"--sha256={sha256}" in fetch["args"]
    assert "--wait_s=7200" in fetch["args"]
    assert fetch["envFrom"] == [{"secretRef": {"name": "hub-token"}}]
    assert "envFrom" not in fetches_of(items)["fetch-reward-own"]
    served = serve_config(items)["reward"]["models"]["hub"]["model"]
    assert f"--out={served}" in fetch["args"]
    deployment = pod_of(items, "reward").owner["spec"]
    assert deployment["progressDeadlineSeconds"] >= 7200 + 3600


def test_a_folder_is_brought_once_whatever_names_it_is_served_by(helm: object) -> None:
    items = with_models(one={"uri": HUB}, two={"uri": HUB, "config": {"dtype": "float32"}})
    assert set(fetches_of(items)) == {"fetch-reward-one", "fetch-reward-own"}
    models = serve_config(items)["reward"]["models"]
    assert models["one"]["model"] == models["two"]["model"]
    assert models["two"]["dtype"] == "float32"


def test_folders_that_models_may_be_loaded_from_are_mounted(helm: object) -> None:
    settings = (f'reward.model.uri="{HUB}"', 'reward.config.model_folders=["/runs/models"]')
    for folders, is_mounted in ((settings, True), (settings[:1], False)):
        (container,) = pod_of(render(settings=folders), "reward").spec["containers"]
        mounts = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/runs"]
        assert bool(mounts) is is_mounted
        assert all(mount["readOnly"] for mount in mounts)


def entry_of(config: ServerConfig, caller: str) -> Any:
    """The quota that a server counts a caller by."""
    return Quotas(config.quotas, trusts_claims=False)._entry(caller)


MODES = {
    "none": ((), "kleash-trainer"),
    "token": (('auth.mode="token"', 'auth.token.existingSecret="keys"'), "kleash"),
    "serviceAccount": (
        ('auth.mode="serviceAccount"',),
        f"system:serviceaccount:rlhf:{PREFIX}-trainer",
    ),
    "mtls": (
        ('auth.mode="mtls"', 'auth.tls.existingSecret="tls"', 'auth.tls.serverName="one.example"'),
        "one.example",
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("component", ["reward", "reference"])
def test_the_trainer_goes_first_by_the_name_that_servers_know_it_by(
    helm: object, mode: str, component: str
) -> None:
    """Also where quotas are for everybody, and where its name does not say what it is."""
    (usual,) = DEFAULT_QUOTAS
    settings, name = MODES[mode]
    everybody = f'{component}.quotas=[{{"callers":["*"],"maxTokensPerSecond":1}}]'
    for given in ((), (everybody,)):
        entry = entry_of(server_of(render(settings=(*settings, *given)), component), name)
        assert entry.priority_s == usual.priority_s
        assert entry.queue_share == usual.queue_share
        assert entry.max_tokens_per_s == 0
    named = everybody.replace('"*"', f'"{name}"')
    entry = entry_of(server_of(render(settings=(*settings, named)), component), name)
    assert entry.max_tokens_per_s == 1
    assert entry.priority_s == 0


def test_trainers_of_other_releases_go_first_unless_an_entry_has_them(helm: object) -> None:
    quotas = 'reward.quotas=[{"callers":["app"],"prioritySeconds":1}]'
    config = server_of(render(settings=(quotas,)))
    assert entry_of(config, "other-trainer") == DEFAULT_QUOTAS[0].model_copy(
        update={"callers": ("*trainer*",)}
    )
    assert entry_of(config, "app").priority_s == 1


def test_quotas_reach_the_process_with_every_key(helm: object) -> None:
    entry = {
        "callers": ["team-*"],
        "prioritySeconds": 2.5,
        "queueShare": 0.5,
        "maxTokensPerSecond": 20000,
        "burstTokens": 3_000_000,
        "maxRunningCalls": 32,
    }
    for component in ("reward", "reference"):
        config = server_of(
            render(settings=(f"{component}.quotas=[{json.dumps(entry)}]",)), component
        )
        assert entry_of(config, "team-a").model_dump() == {
            "callers": ("team-*",),
            "priority_s": 2.5,
            "queue_share": 0.5,
            "max_tokens_per_s": 20000,
            "burst_tokens": 3_000_000,
            "max_running_calls": 32,
        }
    packed = render(settings=("packed.enabled=true", f"packed.quotas=[{json.dumps(entry)}]"))
    assert entry_of(server_of(packed, "packed"), "team-a").max_running_calls == 32


@pytest.mark.parametrize("component", ["policy", "reward", "reference", "packed"])
def test_audit_reaches_the_process(helm: object, component: str) -> None:
    packed = ("packed.enabled=true",) if component == "packed" else ()
    items = render(settings=(*packed, f'{component}.audit="text"'))
    assert server_of(items, component).audit == "text"
    assert server_of(render(settings=packed), component).audit == "auto"


def test_audit_of_the_trainer_is_of_its_service_and_of_its_store(helm: object) -> None:
    items = render(settings=('trainer.audit="calls"',))
    tree = config_of(items, pod_of(items, "trainer"), "ppo.json")
    assert tree["server"]["audit"] == "calls"
    assert tree["publish"]["server"]["audit"] == "calls"
