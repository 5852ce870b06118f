"""Discovery of policy replicas, against a real API server; the test is the endpoint controller."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.k8s.api_server import ApiServer

from kleash.cluster import discovery
from kleash.cluster.discovery import by_endpoint_slices

pytestmark = pytest.mark.k8s

SERVICE = "kleash-policy-headless"


class Seen:
    """What a discovery yields, followed in a thread."""

    def __init__(self, discover: discovery.Discover) -> None:
        self.stopping = threading.Event()
        self.sets: list[frozenset[str]] = []
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, args=(discover,), daemon=True)
        self.thread.start()

    def _run(self, discover: discovery.Discover) -> None:
        for found in discover(self.stopping):
            with self.changed:
                self.sets.append(found)
                self.changed.notify_all()

    def wait_for(self, *addresses: str) -> None:
        wanted = frozenset(addresses)
        with self.changed:
            came = self.changed.wait_for(lambda: self.sets and self.sets[-1] == wanted, 20)
        assert came, f"{sorted(wanted)} did not come; the last was {self.sets[-1:]}"


@pytest.fixture
def api(api_server: ApiServer) -> Iterator[Any]:
    from kubernetes import config

    with config.new_client_from_config(str(api_server.kubeconfig)) as api:
        yield api


class Slices:
    """Writes EndpointSlices of one Service."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.namespace = server.create_namespace()
        self.path = f"/apis/discovery.k8s.io/v1/namespaces/{self.namespace}/endpointslices"

    def create(
        self,
        name: str,
        *endpoints: dict[str, Any],
        service: str = SERVICE,
        address_type: str = "IPv4",
    ) -> None:
        new = {**self._slice(name, endpoints, service), "addressType": address_type}
        self.server.request("POST", self.path, new)

    def replace(self, name: str, *endpoints: dict[str, Any]) -> None:
        self.server.request("PUT", f"{self.path}/{name}", self._slice(name, endpoints, SERVICE))

    def delete(self, name: str) -> None:
        self.server.request("DELETE", f"{self.path}/{name}")

    def _slice(self, name: str, endpoints: Any, service: str) -> dict[str, Any]:
        return {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4",
            "ports": [{"name": "grpc", "port": 50051}],
            "endpoints": list(endpoints),
        }


def endpoint(address: str, *, pod: str = "", **conditions: bool) -> dict[str, Any]:
    """``pod``: the uid of the pod behind it."""
    target = {"targetRef": {"kind": "Pod", "name": f"policy-{pod}", "uid": pod}} if pod else {}
    return {"addresses": [address], "conditions": conditions, **target}


@pytest.fixture
def slices(api_server: ApiServer) -> Slices:
    return Slices(api_server)


@pytest.fixture
def seen(slices: Slices, api: Any) -> Iterator[Seen]:
    address = f"dns:///{SERVICE}.{slices.namespace}.svc.cluster.local:50051"
    seen = Seen(by_endpoint_slices(address, api))
    yield seen
    seen.stopping.set()
    slices.create("the-last")  # wakes the watch
    seen.thread.join(10)
    assert not seen.thread.is_alive()


def test_replicas_that_come_and_go_are_seen(slices: Slices, seen: Seen) -> None:
    """One that is not ready waits for weights and counts; one that terminates does not."""
    seen.wait_for()
    slices.create("a", endpoint("10.0.0.1", ready=True))
    seen.wait_for("10.0.0.1:50051")
    slices.create("b", endpoint("10.0.0.2", ready=False, serving=False))
    seen.wait_for("10.0.0.1:50051", "10.0.0.2:50051")
    slices.replace("a", endpoint("10.0.0.1", ready=False, serving=True, terminating=True))
    seen.wait_for("10.0.0.2:50051")
    slices.delete("b")
    seen.wait_for()


def test_slices_of_other_services_are_not_mixed_in(slices: Slices, seen: Seen) -> None:
    slices.create("other", endpoint("10.0.0.9"), service="kleash-reward-headless")
    slices.create("a", endpoint("10.0.0.1"))
    seen.wait_for("10.0.0.1:50051")


def test_a_pod_with_two_addresses_is_one_replica(slices: Slices, seen: Seen) -> None:
    """Of a Service with both IP versions, at the IPv4 address."""
    slices.create("a", endpoint("10.0.0.1", pod="1"), endpoint("10.0.0.2", pod="2"))
    seen.wait_for("10.0.0.1:50051", "10.0.0.2:50051")
    six = (endpoint("fd00::1", pod="1"), endpoint("fd00::2", pod="2"), endpoint("fd00::3", pod="3"))
    slices.create("b", *six, address_type="IPv6")
    seen.wait_for("10.0.0.1:50051", "10.0.0.2:50051", "[fd00::3]:50051")
    # What is known by one address stays there: its clients need not be opened again.
    slices.create("c", endpoint("10.0.0.3", pod="3"), endpoint("10.0.0.4", pod="4"))
    seen.wait_for("10.0.0.1:50051", "10.0.0.2:50051", "10.0.0.4:50051", "[fd00::3]:50051")
    # The slices change one after the other: leaving in one of them is leaving.
    slices.replace(
        "a", endpoint("10.0.0.1", pod="1"), endpoint("10.0.0.2", pod="2", terminating=True)
    )
    seen.wait_for("10.0.0.1:50051", "10.0.0.4:50051", "[fd00::3]:50051")


def test_an_ended_watch_goes_on(slices: Slices, api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "WATCH_S", 1)
    seen = Seen(by_endpoint_slices(f"{SERVICE}.{slices.namespace}:50051", api))
    seen.wait_for()
    for number in (1, 2, 3):
        slices.create(f"s{number}", endpoint(f"10.0.0.{number}"))
        seen.wait_for(*(f"10.0.0.{its}:50051" for its in range(1, number + 1)))
        threading.Event().wait(1.2)
    seen.stopping.set()
    seen.thread.join(10)
    assert not seen.thread.is_alive()


def test_without_rights_dns_is_asked(
    slices: Slices, api_server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    from kubernetes import config

    core = f"/api/v1/namespaces/{slices.namespace}"
    api_server.request("POST", f"{core}/serviceaccounts", {"metadata": {"name": "weak"}})
    kubeconfig = api_server.service_account_kubeconfig(slices.namespace, "weak")
    with config.new_client_from_config(str(kubeconfig)) as weak:
        seen = Seen(by_endpoint_slices("localhost:50051", weak))
        with seen.changed:
            assert seen.changed.wait_for(lambda: bool(seen.sets), 20)
        seen.stopping.set()
        seen.thread.join(10)
    assert "127.0.0.1:50051" in seen.sets[-1]
    assert "cannot be read (403 Forbidden); looking up localhost instead" in caplog.text
