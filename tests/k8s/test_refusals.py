"""Values that do not fit together are refused with a sentence that says what to do."""

from __future__ import annotations

import pytest
from tests.k8s.chart import RenderError, render_text

pytestmark = pytest.mark.k8s

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
