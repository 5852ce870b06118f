"""Who may reach whom under a set of NetworkPolicies, by the rules of networking.k8s.io/v1.

A connection is allowed when the source's egress and the target's ingress both allow it. A pod
that no policy of a direction selects is open in that direction; otherwise one rule must match.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.k8s.chart import Object, of_kind, selects


@dataclass(frozen=True)
class Peer:
    """One end of a connection: a pod, or an address outside of the cluster."""

    name: str
    namespace: str = ""
    """Empty: outside of the cluster."""
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    address: str = "10.244.0.10"
    ports: Mapping[str, int] = field(default_factory=dict)
    """Container ports by name; a policy may name one."""

    @property
    def all_namespace_labels(self) -> dict[str, str]:
        """With the one that the API server adds."""
        return {**self.namespace_labels, "kubernetes.io/metadata.name": self.namespace}


def is_allowed(
    objects: Sequence[Object], source: Peer, target: Peer, port: int, protocol: str = "TCP"
) -> bool:
    """Whether ``source`` may open a connection to ``port`` of ``target``."""
    return _is_open(objects, "egress", source, target, (port, protocol)) and _is_open(
        objects, "ingress", target, source, (port, protocol)
    )


def _is_open(
    objects: Sequence[Object], direction: str, pod: Peer, other: Peer, port: tuple[int, str]
) -> bool:
    """Whether the policies of ``pod`` let ``other`` through in one direction."""
    if not pod.namespace:
        return True
    target = pod if direction == "ingress" else other
    rules: list[dict[str, Any]] = []
    is_isolated = False
    for policy in of_kind(objects, "NetworkPolicy"):
        spec = policy["spec"]
        if policy["metadata"]["namespace"] != pod.namespace:
            continue
        if not selects(spec["podSelector"], pod.labels) or direction not in _directions(spec):
            continue
        is_isolated = True
        rules += spec.get(direction) or []
    peers_key = "from" if direction == "ingress" else "to"
    return not is_isolated or any(
        _has_port(rule, target, *port) and _has_peer(rule.get(peers_key), pod.namespace, other)
        for rule in rules
    )


def _directions(spec: Mapping[str, Any]) -> list[str]:
    default = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]
    return [name.lower() for name in spec.get("policyTypes") or default]


def _has_port(rule: Mapping[str, Any], target: Peer, number: int, protocol: str) -> bool:
    ports = rule.get("ports")
    if not ports:
        return True
    for port in ports:
        if port.get("protocol", "TCP") != protocol:
            continue
        first = port.get("port")
        if isinstance(first, str):
            first = target.ports.get(first)
            if first is None:
                continue
        if first is None or first <= number <= port.get("endPort", first):
            return True
    return False


def _has_peer(peers: Sequence[Mapping[str, Any]] | None, namespace: str, other: Peer) -> bool:
    if not peers:
        return True
    return any(_is_peer(peer, namespace, other) for peer in peers)


def _is_peer(peer: Mapping[str, Any], namespace: str, other: Peer) -> bool:
    if "ipBlock" in peer:
        block, address = peer["ipBlock"], ipaddress.ip_address(other.address)
        excluded = any(address in ipaddress.ip_network(cidr) for cidr in block.get("except", []))
        return address in ipaddress.ip_network(block["cidr"]) and not excluded
    if not other.namespace:
        return False
    if "namespaceSelector" in peer:
        is_namespace = selects(peer["namespaceSelector"], other.all_namespace_labels)
    else:
        is_namespace = other.namespace == namespace
    return is_namespace and selects(peer.get("podSelector", {}), other.labels)
