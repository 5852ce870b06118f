"""The API server that other tests rely on: rights, Pod Security, and that nothing stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.k8s.api_server import ASSETS_VARIABLE, ApiServer, assets_folder

pytestmark = pytest.mark.k8s

POD = {
    "metadata": {"name": "bare"},
    "spec": {"containers": [{"name": "main", "image": "example.org/image:1"}]},
}


def test_an_account_has_the_rights_that_a_role_gives_it_and_no_more(api_server: ApiServer) -> None:
    from kubernetes import client, config

    namespace = api_server.create_namespace()
    core = f"/api/v1/namespaces/{namespace}"
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    api_server.request("POST", f"{core}/serviceaccounts", {"metadata": {"name": "reader"}})
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list"]}]
    api_server.request("POST", f"{rbac}/roles", {"metadata": {"name": "reader"}, "rules": rules})
    binding = {
        "metadata": {"name": "reader"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
        "subjects": [{"kind": "ServiceAccount", "name": "reader", "namespace": namespace}],
    }
    api_server.request("POST", f"{rbac}/rolebindings", binding)

    kubeconfig = api_server.service_account_kubeconfig(namespace, "reader")
    with config.new_client_from_config(str(kubeconfig)) as api:
        objects = client.CoreV1Api(api)
        assert objects.list_namespaced_config_map(namespace).items == []
        with pytest.raises(client.ApiException) as refusal:
            objects.list_namespaced_secret(namespace)
    assert refusal.value.status == 403


def test_pod_security_refuses_a_bare_pod(api_server: ApiServer) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = api_server.create_namespace(labels=labels)
    with pytest.raises(RuntimeError, match="violates PodSecurity"):
        api_server.request("POST", f"/api/v1/namespaces/{namespace}/pods", POD)


def test_a_typo_in_the_variable_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ASSETS_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no executable etcd and no kube-apiserver"):
        assets_folder()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    for name in ("etcd", "kube-apiserver"):
        script = tmp_path / name
        script.write_text("#!/bin/sh\necho no room left\nexit 3\n")
        script.chmod(0o755)
    with (
        pytest.raises(RuntimeError, match="etcd exited with 3: no room left"),
        ApiServer(tmp_path, tmp_path / "data"),
    ):
        pass
