"""The evaluator of NetworkPolicies, on cases of the Kubernetes documentation."""

from __future__ import annotations

from typing import Any

import pytest
from tests.k8s.netpol import Peer, is_allowed

pytestmark = pytest.mark.k8s

DATABASE = Peer("db", "default", {"role": "db"}, ports={"redis": 6379})
FRONTEND = Peer("frontend", "default", {"role": "frontend"}, address="10.244.0.3")
STRANGER = Peer("stranger", "default", {"role": "other"}, address="10.244.0.4")
PROJECT = Peer("project", "tools", {}, {"project": "myproject"}, address="10.244.0.5")
OUTSIDE = Peer("outside", address="172.17.2.9")
EXCLUDED = Peer("excluded", address="172.17.1.9")


def policy(**spec: Any) -> dict[str, Any]:
    metadata = {"name": "test", "namespace": "default"}
    return {"kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


DOCUMENTED = policy(
    podSelector={"matchLabels": {"role": "db"}},
    policyTypes=["Ingress", "Egress"],
    ingress=[
        {
            "from": [
                {"ipBlock": {"cidr": "172.17.0.0/16", "except": ["172.17.1.0/24"]}},
                {"namespaceSelector": {"matchLabels": {"project": "myproject"}}},
                {"podSelector": {"matchLabels": {"role": "frontend"}}},
            ],
            "ports": [{"protocol": "TCP", "port": "redis"}],
        }
    ],
    egress=[
        {"to": [{"ipBlock": {"cidr": "10.0.0.0/24"}}], "ports": [{"port": 5978, "endPort": 5980}]}
    ],
)


@pytest.mark.parametrize(
    ("source", "port", "expected"),
    [
        (FRONTEND, 6379, True),
        (FRONTEND, 6380, False),
        (STRANGER, 6379, False),
        (PROJECT, 6379, True),
        (OUTSIDE, 6379, True),
        (EXCLUDED, 6379, False),
    ],
)
def test_ingress(source: Peer, port: int, expected: bool) -> None:
    assert is_allowed([DOCUMENTED], source, DATABASE, port) is expected


@pytest.mark.parametrize(
    ("address", "port", "protocol", "expected"),
    [
        ("10.0.0.7", 5978, "TCP", True),
        ("10.0.0.7", 5980, "TCP", True),
        ("10.0.0.7", 5981, "TCP", False),
        ("10.0.0.7", 5978, "UDP", False),
        ("10.0.1.7", 5978, "TCP", False),
    ],
)
def test_egress(address: str, port: int, protocol: str, expected: bool) -> None:
    target = Peer("target", address=address)
    assert is_allowed([DOCUMENTED], DATABASE, target, port, protocol) is expected


def test_a_pod_that_nothing_selects_is_open() -> None:
    assert is_allowed([DOCUMENTED], FRONTEND, STRANGER, 80)
    assert is_allowed([], STRANGER, DATABASE, 6379)


def test_deny_all_and_allow_all() -> None:
    deny = policy(podSelector={}, policyTypes=["Ingress"])
    allow = policy(podSelector={}, policyTypes=["Ingress"], ingress=[{}])
    assert not is_allowed([deny], FRONTEND, DATABASE, 6379)
    assert is_allowed([deny, allow], FRONTEND, DATABASE, 6379)
    assert is_allowed([deny], DATABASE, OUTSIDE, 443)


def test_egress_of_the_source_counts_too() -> None:
    closed = policy(podSelector={"matchLabels": {"role": "frontend"}}, policyTypes=["Egress"])
    assert not is_allowed([closed], FRONTEND, STRANGER, 80)
    assert is_allowed([closed], STRANGER, FRONTEND, 80)


def test_a_namespace_and_a_pod_in_one_peer_must_both_match() -> None:
    both = policy(
        podSelector={},
        ingress=[
            {
                "from": [
                    {
                        "namespaceSelector": {"matchLabels": {"project": "myproject"}},
                        "podSelector": {"matchLabels": {"role": "frontend"}},
                    }
                ]
            }
        ],
    )
    assert not is_allowed([both], PROJECT, DATABASE, 6379)
    assert not is_allowed([both], FRONTEND, DATABASE, 6379)
