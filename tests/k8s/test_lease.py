"""The Lease of a fleet, against a real API server: one trainer at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.k8s.api_server import ApiServer

from kleash.base.errors import ConfigError
from kleash.cluster import lease as lease_module
from kleash.cluster.lease import FleetLease, hold_lease
from kleash.ppo.config import PPOConfig
from kleash.rpc.errors import PermissionDenied, Unavailable

pytestmark = pytest.mark.k8s

WAIT_S = 20.0
NAME = "kleash-policy"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds, not tens of them, until a lease expires."""
    for name, value in {"DURATION_S": 3, "RENEW_S": 0.5, "POLL_S": 0.1, "MARGIN_S": 1.0}.items():
        monkeypatch.setattr(lease_module, name, value)


@pytest.fixture
def api(api_server: ApiServer) -> Iterator[Any]:
    from kubernetes import config

    with config.new_client_from_config(str(api_server.kubeconfig)) as api:
        yield api


@pytest.fixture
def namespace(api_server: ApiServer) -> str:
    return api_server.create_namespace()


def lease_of(api: Any, namespace: str, run: str, holder: str = "trainer-0") -> FleetLease:
    return FleetLease(api, namespace, NAME, run=run, holder=holder)


def stored(api_server: ApiServer, namespace: str) -> dict[str, Any]:
    path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{NAME}"
    return api_server.request("GET", path)


def crash(lease: FleetLease) -> None:
    """Renewals stop and nothing is given back."""
    lease._stopping.set()
    lease._thread.join()


def test_it_is_made_kept_recorded_and_given_back(
    api: Any, api_server: ApiServer, namespace: str
) -> None:
    lease = lease_of(api, namespace, "run")
    lease.acquire(WAIT_S, lambda: False)
    first = stored(api_server, namespace)["spec"]
    assert (first["holderIdentity"], first["leaseTransitions"]) == ("run/trainer-0", 1)
    assert lease.fence == 0
    lease.record("run-1a2b", 7)
    deadline = time.monotonic() + WAIT_S
    while stored(api_server, namespace)["spec"]["renewTime"] == first["renewTime"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    lease.check()
    lease.release()
    after = stored(api_server, namespace)
    assert after["spec"].get("holderIdentity", "") == ""
    assert after["metadata"]["annotations"] == {
        "kleash.dev/run": "run-1a2b",
        "kleash.dev/fence": "7",
    }


def test_the_next_holder_gets_it_at_once_and_knows_the_fence(api: Any, namespace: str) -> None:
    first = lease_of(api, namespace, "run")
    first.acquire(WAIT_S, lambda: False)
    first.record("run-1", 3)
    first.release()
    second = lease_of(api, namespace, "another")
    began = time.monotonic()
    second.acquire(WAIT_S, lambda: False)
    took = time.monotonic() - began
    assert second.fence == 3
    second.release()
    assert took < 3, "it waited for an expiry that it need not wait for"


def test_a_living_trainer_of_another_run_is_not_disturbed(api: Any, namespace: str) -> None:
    first = lease_of(api, namespace, "run")
    first.acquire(WAIT_S, lambda: False)
    second = lease_of(api, namespace, "another", "trainer-x")
    with pytest.raises(ConfigError, match="belong to the run 'run', whose trainer trainer-0"):
        second.acquire(WAIT_S, lambda: False)
    second.release()
    first.check()
    first.release()


def test_who_waits_in_vain_is_told_for_whom_and_what_to_do(api: Any, namespace: str) -> None:
    first = lease_of(api, namespace, "run", "trainer-0")
    first.acquire(WAIT_S, lambda: False)
    second = lease_of(api, namespace, "run", "trainer-1")
    with pytest.raises(Unavailable) as refusal:
        second.acquire(0.5, lambda: False)
    assert str(refusal.value) == (
        f"the lease {namespace}/{NAME} could not be had within 0.5 s: it is held by run/trainer-0; "
        f"kubectl describe lease {NAME} -n {namespace} shows its holder and when it renewed: end "
        "that trainer, or raise services.wait_s."
    )
    first.release()


def test_a_trainer_of_the_same_run_waits_for_the_one_before(api: Any, namespace: str) -> None:
    """As after an upgrade, whose new pod starts before the old one has ended."""
    first = lease_of(api, namespace, "run", "trainer-0")
    first.acquire(WAIT_S, lambda: False)
    second = lease_of(api, namespace, "run", "trainer-1")
    waiting = threading.Thread(target=second.acquire, args=(WAIT_S, lambda: False))
    waiting.start()
    time.sleep(4)  # longer than a lease lasts without renewal
    assert waiting.is_alive()
    first.check()
    first.release()
    waiting.join(WAIT_S)
    assert not waiting.is_alive()
    second.check()
    second.release()


def test_a_dead_trainer_is_followed_after_its_lease_has_expired(api: Any, namespace: str) -> None:
    """By a trainer of any run; and the dead one, should it wake up, learns that it has lost."""
    first = lease_of(api, namespace, "run")
    first.acquire(WAIT_S, lambda: False)
    crash(first)
    second = lease_of(api, namespace, "another", "trainer-x")
    second.acquire(WAIT_S, lambda: False)
    second.check()
    with pytest.raises((Unavailable, PermissionDenied)):
        first.check()
    with first._lock:
        first._renew()
    with pytest.raises(PermissionDenied, match="held by another/trainer-x now"):
        first.check()
    first.release()
    second.check()
    second.release()


def test_without_renewals_nothing_may_be_published(
    api: Any, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API is away: the lease may be another's by now, and is this trainer's when it is back."""
    from urllib3.exceptions import ProtocolError

    lease = lease_of(api, namespace, "run")
    lease.acquire(WAIT_S, lambda: False)
    real = lease._replace

    def away() -> None:
        raise ProtocolError("connection refused")

    monkeypatch.setattr(lease, "_replace", away)
    time.sleep(3)
    with pytest.raises(Unavailable, match="connection refused"):
        lease.check()
    monkeypatch.setattr(lease, "_replace", real)
    time.sleep(1.5)
    lease.check()
    lease.release()


def test_a_change_by_hand_does_not_lose_it(api: Any, api_server: ApiServer, namespace: str) -> None:
    lease = lease_of(api, namespace, "run")
    lease.acquire(WAIT_S, lambda: False)
    path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{NAME}"
    while True:
        changed = stored(api_server, namespace)
        changed["metadata"]["labels"] = {"team": "alignment"}
        try:
            api_server.request("PUT", path, changed)
            break
        except RuntimeError:  # a renewal came in between
            continue
    time.sleep(1.5)
    lease.check()
    assert stored(api_server, namespace)["metadata"]["labels"] == {"team": "alignment"}
    lease.release()


def test_a_lease_that_was_deleted_is_made_again(
    api: Any, api_server: ApiServer, namespace: str
) -> None:
    lease = lease_of(api, namespace, "run")
    lease.acquire(WAIT_S, lambda: False)
    lease.record("run-1", 4)
    path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{NAME}"
    api_server.request("DELETE", path)
    time.sleep(3)
    lease.check()
    made = stored(api_server, namespace)
    assert made["spec"]["holderIdentity"] == "run/trainer-0"
    assert made["metadata"]["annotations"]["kleash.dev/fence"] == "4"
    lease.release()


def test_missing_rights_are_named(api_server: ApiServer, namespace: str) -> None:
    from kubernetes import config

    core = f"/api/v1/namespaces/{namespace}"
    api_server.request("POST", f"{core}/serviceaccounts", {"metadata": {"name": "trainer"}})
    kubeconfig = api_server.service_account_kubeconfig(namespace, "trainer")
    with config.new_client_from_config(str(kubeconfig)) as weak:
        lease = lease_of(weak, namespace, "run")
        with pytest.raises(ConfigError, match="needs get, create and update of leases"):
            lease.acquire(WAIT_S, lambda: False)
        lease.release()


def test_a_trainer_that_is_told_to_stop_while_it_waits_stops(api: Any, namespace: str) -> None:
    first = lease_of(api, namespace, "run", "trainer-0")
    first.acquire(WAIT_S, lambda: False)
    second = lease_of(api, namespace, "run", "trainer-1")
    with pytest.raises(Unavailable, match="held by run/trainer-0"):
        second.acquire(600, lambda: True)
    first.release()


def test_the_configuration_names_it(
    api_server: ApiServer, namespace: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(api_server.kubeconfig))
    monkeypatch.setenv("POD_NAME", "kleash-trainer-abc")
    monkeypatch.setenv("POD_NAMESPACE", namespace)
    config = PPOConfig.model_validate(
        {
            "out": tmp_path / "ppo",
            "run_id": "mine",
            "prompts": "prompts.jsonl",
            "model": "sft",
            "reward_model": "rm",
            "publish": {"lease": NAME},
        }
    )
    with hold_lease(config, lambda: False) as lease:
        lease.check()
        holder = stored(api_server, namespace)["spec"]["holderIdentity"]
    assert holder == "mine/kleash-trainer-abc"
