"""A real API server accepts what the chart renders, in a namespace that enforces `restricted`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.k8s.api_server import ApiServer
from tests.k8s.chart import CHART, VARIANTS, example_name, render, render_text
from tests.k8s.render import MANIFEST_NAMESPACE, MANIFESTS
from tests.k8s.test_api_schemas import CUSTOM
from tests.k8s.tools import need

pytestmark = pytest.mark.k8s

RESTRICTED = {
    f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")
}

Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def kubectl(api_server: ApiServer) -> Kubectl:
    return _kubectl_of(api_server)


def _kubectl_of(server: ApiServer) -> Kubectl:
    program = server.assets / "kubectl"
    path = program if program.exists() else need("kubectl")

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(path), f"--kubeconfig={server.kubeconfig}", *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)

    return call


def _only_own_kinds(values: Path, namespace: str, folder: Path) -> Path:
    """The rendered objects without those whose definitions a bare API server lacks."""
    import yaml

    items = [item for item in render(values, namespace=namespace) if item["kind"] not in CUSTOM]
    path = folder / "objects.yaml"
    path.write_text(yaml.safe_dump_all(items))
    return path


@pytest.mark.parametrize("values", VARIANTS, ids=example_name)
def test_an_example_is_accepted(
    api_server: ApiServer, kubectl: Kubectl, helm: Path, values: Path, tmp_path: Path
) -> None:
    namespace = api_server.create_namespace(labels=RESTRICTED)
    path = _only_own_kinds(values, namespace, tmp_path)
    for extra in ("--dry-run=server", ""):
        # Server-side apply, as Helm 4 does: it refuses duplicate list keys, too.
        options = [*([extra] if extra else []), "--server-side", f"--filename={path}"]
        done = kubectl("apply", "--namespace", namespace, *options)
        assert done.returncode == 0, done.stderr
        assert "PodSecurity" not in done.stderr, done.stderr
        assert "Warning" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["cpu-demo", "gpu"])
def test_manifests_apply_as_documented(api_server: ApiServer, tmp_path: Path, name: str) -> None:
    """With the namespace in the file, so that one command installs on a cluster that is empty."""
    with ApiServer(api_server.assets, tmp_path) as server:
        _check_manifests(server, name)


def _check_manifests(server: ApiServer, name: str) -> None:
    kubectl = _kubectl_of(server)
    path = MANIFESTS / f"{name}.yaml"
    done = kubectl("apply", "--server-side", f"--filename={path}")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    namespace = server.request("GET", f"/api/v1/namespaces/{MANIFEST_NAMESPACE}")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    again = kubectl("diff", "--server-side", f"--filename={path}")
    assert again.returncode == 0, again.stdout


def test_an_upgrade_changes_nothing_that_cannot_change(
    api_server: ApiServer, kubectl: Kubectl, helm: Path, tmp_path: Path
) -> None:
    """Selectors, volume claims and Job templates are fixed; the API server would say 422."""
    namespace = api_server.create_namespace(labels=RESTRICTED)
    values = CHART / "ci" / "cpu-demo-values.yaml"
    for number, settings in enumerate(
        (
            (),
            ('image.tag="9.9.9"',),
            ('image.tag="9.9.9"', "reward.replicas=2", 'trainer.config={"total_steps":7}'),
            ('image.tag="9.9.9"', 'commonLabels={"team":"a"}'),
        )
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(render_text(values, namespace=namespace, settings=settings))
        done = kubectl("apply", "--server-side", "--namespace", namespace, f"--filename={path}")
        assert done.returncode == 0, f"{settings}: {done.stderr}"


def test_the_trainer_may_do_what_it_does_and_no_more(
    api_server: ApiServer, kubectl: Kubectl, helm: Path, tmp_path: Path
) -> None:
    namespace = api_server.create_namespace(labels=RESTRICTED)
    path = _only_own_kinds(CHART / "ci" / "cpu-demo-values.yaml", namespace, tmp_path)
    assert kubectl("apply", "-n", namespace, f"--filename={path}").returncode == 0
    items = render(CHART / "ci" / "cpu-demo-values.yaml", namespace=namespace)
    accounts = {item["metadata"]["name"] for item in items if item["kind"] == "ServiceAccount"}
    trainer = next(name for name in accounts if name.endswith("-trainer"))

    def may(account: str, verb: str, resource: str) -> bool:
        user = f"--as=system:serviceaccount:{namespace}:{account}"
        done = kubectl("auth", "can-i", verb, resource, "-n", namespace, user)
        return done.stdout.strip() == "yes"

    for verb, resource in (
        ("watch", "endpointslices.discovery.k8s.io"),
        ("update", f"leases.coordination.k8s.io/{trainer}"),
        ("create", "events.events.k8s.io"),
    ):
        assert may(trainer, verb, resource), f"{verb} {resource}"
    for verb, resource in (
        ("get", "secrets"),
        ("create", "pods"),
        ("update", "leases.coordination.k8s.io/of-another-release"),
        ("delete", f"leases.coordination.k8s.io/{trainer}"),
    ):
        assert not may(trainer, verb, resource), f"{verb} {resource}"
    for other in accounts - {trainer}:
        assert not may(other, "get", "leases.coordination.k8s.io"), other
        assert not may(other, "get", "secrets"), other
