"""Events of a trainer's pod, against a real API server."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tests.k8s.api_server import ApiServer

from kleash.cluster.events import events_of_this_pod

pytestmark = pytest.mark.k8s

logger = logging.getLogger("kleash.test")


@pytest.fixture
def namespace(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> str:
    namespace = api_server.create_namespace()
    monkeypatch.setenv("KUBECONFIG", str(api_server.kubeconfig))
    monkeypatch.setenv("POD_NAME", "kleash-trainer-abc")
    monkeypatch.setenv("POD_UID", "5f0e")
    monkeypatch.setenv("POD_NAMESPACE", namespace)
    return namespace


def events(api_server: ApiServer, namespace: str) -> list[dict[str, Any]]:
    path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
    return api_server.request("GET", path)["items"]


def test_a_record_with_an_event_is_told_of_the_pod(api_server: ApiServer, namespace: str) -> None:
    with events_of_this_pod():
        logger.warning("replica %d has left", 3, extra={"event": "PolicyReplicaLeft"})
        logger.warning("nobody needs to know")
    (event,) = events(api_server, namespace)
    assert event["reason"] == "PolicyReplicaLeft"
    assert event["note"] == "replica 3 has left"
    assert event["type"] == "Warning"
    assert event["regarding"]["name"] == "kleash-trainer-abc"
    assert event["regarding"]["uid"] == "5f0e"
    assert event["reportingController"] == "kleash.dev/trainer"


def test_a_long_note_is_cut(api_server: ApiServer, namespace: str) -> None:
    with events_of_this_pod():
        logger.error("é" * 2000, extra={"event": "TrainingFailed"})
    (event,) = events(api_server, namespace)
    assert event["note"] == "é" * 512


def test_an_api_that_refuses_stops_nobody(
    api_server: ApiServer,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    core = f"/api/v1/namespaces/{namespace}"
    api_server.request("POST", f"{core}/serviceaccounts", {"metadata": {"name": "weak"}})
    kubeconfig = api_server.service_account_kubeconfig(namespace, "weak")
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    with caplog.at_level(logging.INFO), events_of_this_pod():
        for _ in range(3):
            logger.info("hello", extra={"event": "Hello"})
    assert caplog.text.count("events cannot be written") == 1
    assert events(api_server, namespace) == []


def test_outside_of_a_pod_nothing_is_written(
    namespace: str, api_server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POD_NAME")
    handlers = list(logging.getLogger().handlers)
    with events_of_this_pod():
        logger.info("hello", extra={"event": "Hello"})
        assert logging.getLogger().handlers == handlers
    assert events(api_server, namespace) == []
