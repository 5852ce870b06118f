"""Values that do not fit together are refused with a sentence that says what to do."""

from __future__ import annotations

import pytest
from tests.k8s.chart import RenderError, render_text

pytestmark = pytest.mark.k8s

NO_MODEL = 'reward.model.uri=""'
DIGEST = "sha256:" + "0123456789abcdef" * 4


def refusal(*settings: str, kube_version: str = "") -> str:
    """What helm says; a test fails when it renders."""
    with pytest.raises(RenderError) as error:
        render_text(settings=settings, kube_version=kube_version)
    return " ".join(str(error.value).split())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            ("demo.enabled=false",),
            "is made by the demo Job, and demo.enabled is false; enable it, set another model.uri",
        ),
        (
            ("demo.enabled=false", 'policy.model.uri=""'),
            "policy has no model (policy); set policy.model.uri",
        ),
        (
            ("demo.enabled=false", 'policy.model.uri="pvc:///a"', 'reward.model.uri="pvc:///b"'),
            "the trainer has no prompts; set trainer.config.prompts",
        ),
        (
            ("reward.enabled=false",),
            "the trainer needs a reward service and reward.enabled is false; enable it",
        ),
        (
            ("trainer.nodes=2",),
            "trainer.nodes is 2: the trainer is one process and cannot be spread over nodes yet",
        ),
        (('auth.mode="token"',), "auth.mode is token; set auth.token.existingSecret"),
        (('auth.mode="mtls"',), "TLS is on (auth.mode mtls, auth.tls.enabled false) without"),
        (
            ('auth.mode="mtls"', 'auth.tls.existingSecret="certificates"'),
            "set auth.tls.serverName to a DNS name that it holds",
        ),
        (
            ("reward.autoscaling.enabled=true", 'reward.autoscaling.kind="keda"'),
            "set reward.autoscaling.prometheusAddress",
        ),
        (
            ("reward.autoscaling.enabled=true", "reward.autoscaling.minReplicas=9"),
            "reward.autoscaling.minReplicas is 9 and maxReplicas 4",
        ),
        (
            ("packed.enabled=true", "reference.enabled=false", "trainer.enabled=false"),
            "packed.services names reference, and reference.enabled is false",
        ),
        (("reward.route.enabled=true",), "set reward.route.parentRefs"),
        (
            ("reward.http.enabled=true", "reward.http.route.enabled=true"),
            "reward.http.route is enabled and names no Gateway; set reward.http.route.parentRefs",
        ),
        (
            ("reward.http.route.enabled=true", 'reward.http.route.parentRefs=[{"name":"a"}]'),
            "reward.http.route is enabled and leads to the HTTP port, which reward.http.enabled",
        ),
        (("reward.http.ingress.enabled=true",), "reward.http.ingress is enabled and leads to the"),
        (
            ("reward.http.enabled=true", 'reward.http.ingress.tlsSecret="a"'),
            "no host is named that it is for; set reward.http.ingress.hostnames",
        ),
        (
            ('reward.http.allowedOrigins=["*"]',),
            "reward.http.allowedOrigins has no effect without the HTTP port",
        ),
        (
            ('networkPolicy.rewardHttpClients=[{"podSelector":{}}]',),
            "networkPolicy.rewardHttpClients has no effect without the HTTP port",
        ),
        (
            ('reward.models.a.uri="demo://sft"',),
            "reward.models and reward.model.uri (demo://reward-model) are both set",
        ),
        (
            (NO_MODEL, 'reward.models.b.uri="demo://sft"', 'reward.models.a.uri="demo://sft"'),
            "reward.models has a, b; set reward.default to the one for calls that name none",
        ),
        (
            (NO_MODEL, 'reward.models.a.uri="demo://sft"', 'reward.default="b"'),
            "reward.default is b, and reward.models has a; use one of those",
        ),
        (('reward.default="b"',), "reward.default is b, and reward.models has none"),
        (
            (NO_MODEL, 'reward.models.a.config.dtype="float32"'),
            "reward.models.a has no model; set its uri, or config with function, ensemble or",
        ),
        (
            (NO_MODEL, 'reward.models.a.config.function="a:b"'),
            "reward.models.a is no folder; set trainer.rewardModel.uri",
        ),
        (
            (
                NO_MODEL,
                'reward.models.a.config.remote="b:1"',
                'trainer.rewardModel.uri="demo://sft"',
            ),
            "reward.models.a.config.remote is b:1, outside of the release, and the NetworkPolicy",
        ),
        (("sft.enabled=true",), "sft has no"),
        (("rewardModel.enabled=true",), "rewardModel has no comparisons; set rewardModel.config"),
    ],
)
def test_values_that_do_not_fit(helm: object, settings: tuple[str, ...], sentence: str) -> None:
    assert sentence in refusal(*settings)


@pytest.mark.parametrize(
    "uri",
    [
        "org/name",
        "hf://org/name",
        "oci://registry.example.org/model:v1",
        "demo://nothing",
    ],
)
def test_models_that_are_not_one_model_for_ever(helm: object, uri: str) -> None:
    """A name without a revision or digest is another model tomorrow."""
    message = refusal(f'reward.model.uri="{uri}"')
    assert "reward" in message
    assert uri in message or "pattern" in message


def test_image_volumes_need_a_cluster_that_has_them(helm: object) -> None:
    uri = f'reward.model.uri="oci://registry.example.org/model@{DIGEST}"'
    assert "needs image volumes, and Kubernetes" in refusal(uri, kube_version="1.30.0")
    assert DIGEST in render_text(settings=(uri,), kube_version="1.36.0")


def test_clusters_that_are_too_old_are_refused(helm: object) -> None:
    assert "kubeVersion" in refusal(kube_version="1.27.0")


@pytest.mark.parametrize(
    ("path", "value", "remedy"),
    [
        ("policy.server.port", "6000", "name port 50051; take it out"),
        ("reward.server.health_port", "6000", "name port 8081; take it out"),
        ("reference.server.metrics_port", "0", "name port 9090; take it out"),
        ("policy.server.drain_announce_s", "1", "use that"),
        ("policy.server.drain_delay_s", "1", "follows from policy.drain.delaySeconds"),
        ("policy.server.drain_grace_s", "1", "follows from policy.maxRequestSeconds"),
        ("reward.server.max_request_s", "900", "follows from reward.maxRequestSeconds"),
        ("policy.server.tls.cert", '"/x"', "use auth.tls"),
        ("policy.server.auth.mode", '"token"', "use auth.mode"),
        ("policy.server.auth.allowed_callers", '["a"]', "use policy.allowedCallers"),
        ("reward.server.http_port", "8080", "use reward.http.enabled"),
        ("reference.server.http_port", "8080", "as no other process has one"),
        ("trainer.server.http_port", "8080", "use reward.http.enabled or trainer.http.enabled"),
        ("policy.extraArgs", '["--server.http_port=8080"]', "as no other process has one"),
        ("reward.server.http_allowed_origins", '["*"]', "use reward.http.allowedOrigins"),
        ("reward.server.quotas", "[]", "use reward.quotas"),
        ("reference.server.audit", '"off"', "use reference.audit"),
        ("trainer.server.audit", '"off"', "use trainer.audit"),
        ("trainer.config.publish.server.audit", '"off"', "use trainer.audit"),
        ("policy.config.model", '"/x"', "use policy.model.uri"),
        ("reward.config.models", "{}", "use reward.models"),
        ("reward.config.default", '"x"', "use reward.default"),
        ("reward.config.function", '"a:b"', "use reward.models.NAME.config"),
        ("policy.config.weights.publisher", '"x:1"', "set trainer.enabled=false"),
        ("demo.rewardConfig.model", '"/x"', "use reward.model.uri"),
        ("trainer.server.port", "6000", "name port 50051; take it out"),
        ("trainer.config.server.reflection", "false", "use trainer.server"),
        ("trainer.config.out", '"/x"', "use run.id"),
        ("trainer.config.run_id", '"x"', "use run.id"),
        ("trainer.config.resume", "false", "use another run.id to start anew"),
        ("trainer.config.model", '"/x"', "use trainer.model.uri"),
        ("trainer.config.reward_model", '"/x"', "use trainer.rewardModel.uri"),
        ("trainer.config.publish.server.port", "1", "name port 50061; take it out"),
        ("demo.trainerConfig.out", '"/x"', "use run.id"),
        ("demo.config.out", '"/x"', "lead to /runs/demo"),
        ("demo.config.run_id", '"x"', "use run.id"),
        ("trainer.extraArgs", '["--run_id=x"]', "use run.id"),
        ("policy.extraArgs", '["--server.port=1"]', "name port 50051; take it out"),
        ("reward.extraArgs", '["--reward.model", "x"]', "use reward.model.uri"),
    ],
)
def test_a_process_may_not_be_told_other_than_its_pod(
    helm: object, path: str, value: str, remedy: str
) -> None:
    message = refusal(f"{path}={value}")
    assert remedy in message
    assert path.removesuffix(".reflection") in message


@pytest.mark.parametrize("key", ["sft", "rewardModel"])
@pytest.mark.parametrize(
    ("name", "remedy"), [("out", "use run.id"), ("run_id", "use run.id"), ("model", "model.uri")]
)
def test_a_stage_may_not_be_told_other_than_its_pod(
    helm: object, key: str, name: str, remedy: str
) -> None:
    base = ('sft.model.uri="demo://base"', "sft.enabled=true", 'sft.config.data="/runs/a"')
    reward = ("rewardModel.enabled=true", 'rewardModel.config.data="/runs/b"')
    message = refusal(*base, *reward, f'{key}.config.{name}="/x"')
    assert f"{key}.config.{name}" in message
    assert remedy in message


def test_keys_that_the_objects_do_not_depend_on_are_passed_on(helm: object) -> None:
    for setting in (
        "policy.server.max_message_bytes=1024",
        'policy.server.host="0.0.0.0"',
        'policy.server.tls.client_ca="/x"',
        'policy.server.quotas=[{"callers":["a"],"max_running_calls":2}]',
        'reward.config.admins=["a"]',
        "trainer.config.publish.keep_versions=3",
        'trainer.extraArgs=["--server.reflection=false", "--outlook"]',
        "demo.config.seed=2",
    ):
        assert render_text(settings=(setting,))


PACKED = "packed.enabled=true"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("reward.replicas", "2"),
        ("reward.replicas", "null"),
        ("reward.gpu.count", "1"),
        ("reference.resources.limits.memory", '"2Gi"'),
        ("reference.resources.requests.cpu", "2"),
        ("reference.resources.limits.cpu", "2"),
        ("reward.drain.announceSeconds", "3"),
        ("reward.terminationGracePeriodSeconds", "3"),
        ("reward.strategy.maxSurge", "1"),
        ("reward.extraEnv.A", '"b"'),
        ("reward.extraArgs", '["--reward.dtype=float32"]'),
        ("reward.server.reflection", "false"),
        ("reward.audit", '"off"'),
        ("reward.quotas", '[{"callers":["a"]}]'),
        ("reward.serviceAccount.name", '"mine"'),
        ("reward.modelCache.size", '"1Gi"'),
    ],
)
def test_what_makes_the_pods_of_packed_services_is_refused_where_it_does_nothing(
    helm: object, path: str, value: str
) -> None:
    service, _, key = path.partition(".")
    message = refusal(PACKED, f"{path}={value}")
    assert f"{path} is" in message or f"{path.rpartition('.')[0]} is" in message
    assert f"from packed.{key.split('.')[0]}" in message
    assert f"take {service} out of packed.services" in message


def test_packed_services_keep_what_is_not_of_their_pods(helm: object) -> None:
    for setting in (
        "policy.replicas=2",  # it has pods of its own
        "reward.maxRequestSeconds=30",
        'reward.config={"dtype":"float32"}',
        'reference.service.type="NodePort"',
        "packed.gpu.count=1",
    ):
        assert render_text(settings=(PACKED, setting))


ELSEWHERE = (
    '[{"to":[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"elsewhere"}}}],'
    '"ports":[{"port":50051}]}]'
)
OUTSIDE = {
    "policy": '["policy.elsewhere.svc:50051"]',
    "reward": '"dns:///demo-kleash-reward.elsewhere.svc:50051"',
    "reference": '"10.0.0.7:50051"',
}


@pytest.mark.parametrize("service", sorted(OUTSIDE))
@pytest.mark.parametrize("is_enabled", ["true", "false"])
def test_a_service_outside_of_the_release_needs_a_way(
    helm: object, service: str, is_enabled: str
) -> None:
    settings = (
        f"{service}.enabled={is_enabled}",
        f"trainer.config.services.{service}={OUTSIDE[service]}",
    )
    message = refusal(*settings)
    assert f"trainer.config.services.{service} is" in message
    assert "set trainer.extraEgress to a rule that leads there" in message
    assert render_text(settings=(*settings, "networkPolicy.enabled=false"))
    settings = (*settings, f"trainer.extraEgress={ELSEWHERE}")
    if service == "policy":
        assert "set networkPolicy.weightsClients to its pods" in refusal(*settings)
        settings = (*settings, 'networkPolicy.weightsClients=[{"podSelector":{}}]')
    assert render_text(settings=settings)


def test_a_service_of_the_release_is_not_outside(helm: object) -> None:
    for address in (
        '"demo-kleash-reward.rlhf.svc:50051"',
        '"dns:///demo-kleash-reward-headless.rlhf.svc.cluster.local:50051"',
        '"demo-kleash-reward:50051"',
    ):
        assert render_text(settings=(f"trainer.config.services.reward={address}",))


def test_a_publisher_outside_of_the_release_needs_a_way(helm: object) -> None:
    settings = ("trainer.enabled=false", 'policy.config.weights.publisher="trainer.a.svc:50061"')
    assert "set policy.extraEgress to a rule that leads there" in refusal(*settings)
    assert render_text(settings=(*settings, f"policy.extraEgress={ELSEWHERE}"))


def test_a_port_of_a_model_that_is_not_open_is_refused(helm: object) -> None:
    uri = 'reward.model.uri="https://models.example.org:8443/reward"'
    assert "add 8443 to networkPolicy.downloads.ports" in refusal(uri)
    assert render_text(settings=(uri, "networkPolicy.downloads.ports=[443,8443]"))
    assert render_text(settings=(uri.replace("8443", "443"),))
    assert render_text(settings=(uri, "networkPolicy.enabled=false"))
