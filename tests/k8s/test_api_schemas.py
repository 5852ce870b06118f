"""Every object against Kubernetes's own schemas, oldest and newest, closed to unknown fields."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import kubernetes_validate
import pytest
from tests.k8s.chart import Object, name_of, of_kind, pods, render

pytestmark = pytest.mark.k8s

VERSIONS = ("1.28", kubernetes_validate.latest_version())

CUSTOM: dict[str, tuple[str, tuple[str, ...]]] = {
    "Certificate": ("cert-manager.io/v1", ("secretName", "issuerRef.name", "dnsNames")),
    "GRPCRoute": ("gateway.networking.k8s.io/v1", ("parentRefs", "rules")),
    "HTTPRoute": ("gateway.networking.k8s.io/v1", ("parentRefs", "rules")),
    "Issuer": ("cert-manager.io/v1", ()),
    "PodMonitor": ("monitoring.coreos.com/v1", ("selector.matchLabels", "podMetricsEndpoints")),
    "PrometheusRule": ("monitoring.coreos.com/v1", ("groups",)),
    "ScaledObject": ("keda.sh/v1alpha1", ("scaleTargetRef.name", "triggers")),
    "ServiceMonitor": ("monitoring.coreos.com/v1", ("selector.matchLabels", "endpoints")),
}
"""Kinds that no schema of Kubernetes describes: their API version and the fields they need."""

EVERYTHING = (
    "metrics.serviceMonitor.enabled=true",
    "metrics.podMonitor.enabled=true",
    "metrics.prometheusRule.enabled=true",
    "metrics.dashboards.enabled=true",
)


def as_described(item: Object, version: str) -> Object:
    """The object with what a version's schema wants and its API server does not.

    Until 1.28 the schema of a Job's failure policy called onPodConditions required in every rule;
    the server took rules without it even then. The line can go with 1.28.
    """
    rules = at(item, "spec.podFailurePolicy.rules")
    if version != "1.28" or not rules:
        return item
    item = copy.deepcopy(item)
    for rule in item["spec"]["podFailurePolicy"]["rules"]:
        rule.setdefault("onPodConditions", [])
    return item


def problem(item: Object, version: str) -> str | None:
    """What is wrong with an object of Kubernetes itself, None when nothing is."""
    return _problem(json.dumps(as_described(item, version), sort_keys=True), version)


@functools.cache
def _problem(text: str, version: str) -> str | None:
    """The same by the object's JSON: examples have most of their objects in common."""
    item = json.loads(text)
    try:
        kubernetes_validate.validate(item, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{name_of(item)}: {error.message} at {'.'.join(map(str, error.path))}"
    return None


def at(tree: Any, path: str) -> Any:
    """The value at a dotted path, None when it is not there."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid(objects: list[Object], version: str) -> None:
    own = [item for item in objects if item["kind"] not in CUSTOM]
    assert own
    if version == "1.28":
        # The chart refuses oci:// there; see test_refusals.py.
        own = [item for item in own if not _has_image_volume(item)]
    assert [text for item in own if (text := problem(item, version))] == []


def _has_image_volume(item: Object) -> bool:
    return any("image" in volume for pod in pods([item]) for volume in pod.spec.get("volumes", []))


def test_a_typo_in_an_object_is_seen(defaults: list[Object]) -> None:
    """The check is not one that lets everything pass."""
    item = of_kind(defaults, "Service")[0]
    wrong = {**item, "spec": {**item["spec"], "publishNotReadyAdresses": True}}
    assert "publishNotReadyAdresses" in (problem(wrong, VERSIONS[-1]) or "")


def _check_custom(items: list[Object]) -> int:
    custom = [item for item in items if item["kind"] in CUSTOM]
    for item in custom:
        api_version, fields = CUSTOM[item["kind"]]
        assert item["apiVersion"] == api_version, name_of(item)
        assert set(item) == {"apiVersion", "kind", "metadata", "spec"}, name_of(item)
        for field in fields:
            assert at(item["spec"], field), f"{name_of(item)} has no spec.{field}"
    return len(custom)


def test_custom_resources_have_what_they_need(objects: list[Object]) -> None:
    _check_custom(objects)


def test_what_is_opt_in_is_valid(helm: object) -> None:
    items = render(settings=EVERYTHING)
    kinds = {item["kind"] for item in items}
    assert {"ServiceMonitor", "PodMonitor", "PrometheusRule"} <= kinds
    assert _check_custom(items) >= 3
    own = [item for item in items if item["kind"] not in CUSTOM]
    for version in VERSIONS:
        assert [text for item in own if (text := problem(item, version))] == []
