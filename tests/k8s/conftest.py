"""Fixtures of the Kubernetes tests: the API server, and every example of the chart rendered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.k8s.api_server import ASSETS_VARIABLE, ApiServer, assets_folder
from tests.k8s.chart import VARIANTS, Object, example_name, render
from tests.k8s.controllers import Controllers
from tests.k8s.kubelet import Kubelet
from tests.k8s.pipeline_cluster import Account, Cluster
from tests.k8s.tools import need

from kleash.cluster.connection import connect
from kleash.cluster.objects import Objects


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One API server for the whole session; tests make namespaces of their own."""
    assets: Path | None = assets_folder()
    if assets is None:
        pytest.skip(
            f"{ASSETS_VARIABLE} is not set: point it at a folder with etcd and kube-apiserver, "
            "such as the one that `setup-envtest use -p path` prints"
        )
    with ApiServer(assets, tmp_path_factory.mktemp("api-server")) as server:
        yield server


@pytest.fixture(scope="session")
def kubelet(api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    """Serves the logs of pods that nobody runs."""
    with Kubelet(api_server, tmp_path_factory.mktemp("kubelet")) as kubelet:
        yield kubelet


@pytest.fixture
def cluster(
    api_server: ApiServer, kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    """A namespace of its own whose controllers are played; KUBECONFIG leads to it."""
    monkeypatch.setenv("KUBECONFIG", str(api_server.kubeconfig))
    namespace = api_server.create_namespace()
    with (
        connect(namespace=namespace) as connection,
        closing(Controllers(api_server, namespace, kubelet)) as controllers,
    ):
        yield Cluster(Objects(connection), controllers)


@pytest.fixture
def account(api_server: ApiServer) -> Account:
    """An account without rights, in a namespace of its own."""
    return Account(api_server, api_server.create_namespace())


@pytest.fixture
def helm() -> Path:
    """The helm program."""
    return need("helm")


@pytest.fixture(params=VARIANTS, ids=example_name)
def example(request: pytest.FixtureRequest, helm: Path) -> Path:
    """Values file of each example and variant in turn."""
    return request.param


@pytest.fixture
def objects(example: Path) -> list[Object]:
    """What each example renders."""
    return render(example)


@pytest.fixture
def defaults(helm: Path) -> list[Object]:
    """What the chart renders without any values."""
    return render()
