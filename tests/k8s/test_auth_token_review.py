"""Servers with auth.mode=service_account beside a real API server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.k8s.api_server import ApiServer
from tests.services.doubler import CALL_S, eventually, serving
from tests.services.test_auth_rotation import Named

from kleash.client import (
    Credentials,
    PermissionDenied,
    ReferenceClient,
    Unauthenticated,
    Unavailable,
)
from kleash.rpc import token_review

pytestmark = pytest.mark.k8s

AUDIENCE = "kleash-test"


@dataclass
class Pod:
    """A server's surroundings: a namespace with accounts, and the folder of its own account."""

    api_server: ApiServer
    namespace: str
    folder: Path

    def create_account(self, name: str) -> str:
        """A ServiceAccount; returns the name that servers know it by."""
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts"
        self.api_server.request("POST", path, {"metadata": {"name": name}})
        return f"system:serviceaccount:{self.namespace}:{name}"

    def token(self, name: str, *audiences: str) -> str:
        """As the kubelet projects it; without audiences it is for the API server."""
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{name}/token"
        spec = {"expirationSeconds": 3600, "audiences": audiences}
        return self.api_server.request("POST", path, {"spec": spec})["status"]["token"]


@pytest.fixture
def pod(api_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pod:
    pod = Pod(api_server, api_server.create_namespace("auth"), tmp_path)
    pod.create_account("server")
    (tmp_path / "ca.crt").write_bytes(api_server.ca_file.read_bytes())
    (tmp_path / "token").write_text(pod.token("server"))
    host, _, port = api_server.host.removeprefix("https://").rpartition(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    monkeypatch.setattr(token_review, "SERVICE_ACCOUNT", tmp_path)
    return pod


def bind_server(pod: Pod) -> None:
    """What the chart's ClusterRoleBinding does."""
    name = f"{pod.namespace}-reviews"
    role = {
        "apiGroup": "rbac.authorization.k8s.io",
        "kind": "ClusterRole",
        "name": "system:auth-delegator",
    }
    subject = {"kind": "ServiceAccount", "name": "server", "namespace": pod.namespace}
    path = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"
    pod.api_server.request(
        "POST", path, {"metadata": {"name": name}, "roleRef": role, "subjects": [subject]}
    )


def test_service_accounts_are_known(pod: Pod) -> None:
    bind_server(pod)
    trainer = pod.create_account("trainer")
    pod.create_account("guest")
    auth = {"mode": "service_account", "audience": AUDIENCE, "allowed_callers": [trainer]}
    service = Named()
    with serving(service, auth=auth) as server:

        def call(token: str) -> None:
            credentials = Credentials(token=token)
            with ReferenceClient(
                server.address, timeout_s=CALL_S, credentials=credentials
            ) as client:
                client.get_model()

        right = pod.token("trainer", AUDIENCE, "another")
        call(right)
        assert service.callers == [trainer]
        with pytest.raises(PermissionDenied, match="guest' may not call this server"):
            call(pod.token("guest", AUDIENCE))
        with pytest.raises(Unauthenticated, match=f"not for '{AUDIENCE}'"):
            call(pod.token("trainer", "another"))
        with pytest.raises(Unauthenticated, match=f"not for '{AUDIENCE}'"):
            call(pod.token("trainer"))
        with pytest.raises(Unauthenticated, match="does not accept the token"):
            call(right[:-4] + "AAAA")
        # The administrator's token is the API server's own, and no JWT.
        with pytest.raises(Unauthenticated, match="not one of a Kubernetes ServiceAccount"):
            call(pod.api_server.token)
        assert service.callers == [trainer]


def test_an_account_that_is_deleted_is_forgotten(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the time of an answer and the 10 s for which the API server keeps its own."""
    monkeypatch.setattr(token_review, "ACCEPTED_S", 0.2)
    bind_server(pod)
    pod.create_account("trainer")
    with serving(Named(), auth={"mode": "service_account", "audience": AUDIENCE}) as server:
        credentials = Credentials(token=pod.token("trainer", AUDIENCE))
        with ReferenceClient(server.address, timeout_s=CALL_S, credentials=credentials) as client:
            client.get_model()
            path = f"/api/v1/namespaces/{pod.namespace}/serviceaccounts/trainer"
            pod.api_server.request("DELETE", path)

            def is_refused() -> bool:
                try:
                    client.get_model()
                except Unauthenticated as error:
                    return "does not accept the token" in str(error)
                return False

            eventually(is_refused)


def test_without_the_right_to_review_nobody_gets_in(
    pod: Pod, caplog: pytest.LogCaptureFixture
) -> None:
    pod.create_account("trainer")
    service = Named()
    with serving(service, auth={"mode": "service_account", "audience": AUDIENCE}) as server:
        credentials = Credentials(token=pod.token("trainer", AUDIENCE))
        with (
            ReferenceClient(server.address, timeout_s=CALL_S, credentials=credentials) as client,
            pytest.raises(Unavailable) as caught,
        ):
            client.get_model()
    assert caught.value.reason == "AUTH_UNAVAILABLE"
    assert "bind it to the ClusterRole system:auth-delegator" in caplog.text
    assert service.callers == []
