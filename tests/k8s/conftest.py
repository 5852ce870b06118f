"""Fixtures of the Kubernetes tests: the API server, and every example of the chart rendered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.k8s.api_server import ASSETS_VARIABLE, ApiServer, assets_folder
from tests.k8s.chart import EXAMPLES, Object, example_name, render
from tests.k8s.tools import need


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


@pytest.fixture
def helm() -> Path:
    """The helm program."""
    return need("helm")


@pytest.fixture(params=EXAMPLES, ids=example_name)
def example(request: pytest.FixtureRequest, helm: Path) -> Path:
    """Values file of each example in turn."""
    return request.param


@pytest.fixture
def objects(example: Path) -> list[Object]:
    """What each example renders."""
    return render(example)


@pytest.fixture
def defaults(helm: Path) -> list[Object]:
    """What the chart renders without any values."""
    return render()
