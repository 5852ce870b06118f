"""The wheel: one distribution from three roots, whose base install is the client alone."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
CHART = ROOT / "k8s" / "chart"
ROOTS = ("protos", "services", "trainer")
SHARED = ("policy", "reward", "reference", "weights", "trainer", "common")
"""Packages that are in several roots."""
HEAVY = ("torch", "transformers", "pydantic", "prometheus_client")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built by the build backend itself, in this environment: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_it_holds_every_file_of_the_three_roots(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if name.startswith("kleash/")}
    assert {
        "kleash/reward/v1/reward_pb2.py",
        "kleash/reward/service.py",
        "kleash/cli/main.py",
        "kleash/evaluate/report.html.j2",
        "kleash/client/py.typed",
    } <= packed
    source = {
        path.relative_to(ROOT / root).as_posix()
        for root in ROOTS
        for path in (ROOT / root / "kleash").rglob("*")
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    }
    chart = {
        f"kleash/cluster/chart/{path.relative_to(CHART).as_posix()}"
        for path in CHART.rglob("*")
        if path.is_file()
    }
    assert "kleash/cluster/chart/Chart.yaml" in chart
    assert packed == source | chart


def test_an_installed_kleash_finds_its_chart(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Beside its own modules; a source checkout finds k8s/chart."""
    wheel.extractall(tmp_path)
    code = "from kleash.cluster.helm_chart import find_chart; print(find_chart())"
    for folder, expected in (
        (tmp_path, tmp_path / "kleash" / "cluster" / "chart"),
        (None, CHART),
    ):
        first = f"import sys; sys.path.insert(0, {str(folder)!r}); " if folder else ""
        command = [sys.executable, "-c", first + code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
        assert Path(done.stdout.strip()) == expected


def test_nothing_but_the_package_is_installed(wheel: zipfile.ZipFile) -> None:
    assert {re.sub(r"-[^/]*$", "", name.split("/")[0]) for name in wheel.namelist()} == {"kleash"}


def test_shared_packages_stay_open_for_the_other_roots(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    folders = ("kleash", *(f"kleash/{name}" for name in SHARED))
    assert all(any(name.startswith(f"{folder}/") for name in names) for folder in folders)
    assert {f"{folder}/__init__.py" for folder in folders} & names == set()


def test_base_requirements_are_those_of_the_client(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(path))
    required = metadata.get_all("Requires-Dist") or []
    names = {re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line}
    assert names == {"grpcio", "protobuf", "googleapis-common-protos", "numpy"}
    assert set(metadata.get_all("Provides-Extra") or []) == {
        "serve",
        "train",
        "k8s",
        "tensorboard",
        "wandb",
        "mlflow",
        "trace",
        "vllm",
        "dev",
    }


def test_the_command_is_installed(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "kleash = kleash.cli.main:main" in wheel.read(path).decode().splitlines()


def test_the_client_works_without_what_it_does_not_require(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    """From the unpacked wheel: without site, the path file of an editable install is not read."""
    wheel.extractall(tmp_path)
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)

sys.meta_path.insert(0, Missing())
sys.path.insert(0, {str(tmp_path)!r})
sys.path.extend({sorted(packages)!r})
import kleash.client
client = kleash.client.RewardClient("127.0.0.1:1", timeout_s=1)
client.close()
print(*(m.__file__ for n, m in sys.modules.items() if n.startswith("kleash.") and m.__file__))
try:
    import pydantic
except ModuleNotFoundError:
    print("blocked")
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files, blocked = done.stdout.splitlines()
    assert blocked == "blocked"
    assert len(files.split()) > 10
    assert all(Path(file).is_relative_to(tmp_path) for file in files.split())
