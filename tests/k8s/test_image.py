"""The image itself, built by buildah and run as Kubernetes would run it: `make test-image`.

It takes minutes, root, and about 5 GB of disk: KLEASH_TEST_IMAGE_BUILD=1 asks for it, with a base
that debootstrap makes, so that no registry is needed. KLEASH_TEST_IMAGE=NAME tests a CPU image that
buildah has already.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.k8s.api_server import free_ports
from tests.k8s.container import UID, Container, image_config, runtime
from tests.k8s.tools import ROOT

from kleash.client.reward import RewardClient
from kleash.common.v1 import common_pb2
from kleash.lm.digest import model_digest
from kleash.lm.load import load_sequence_classifier
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc

pytestmark = [pytest.mark.k8s, pytest.mark.slow, pytest.mark.timeout(3600)]

BASE = "localhost/kleash-base:bookworm"
SERVICE = "kleash.reward.v1.RewardService"
DRAIN_DELAY_S = 3


@pytest.fixture(scope="module")
def image() -> str:
    """The name of the image under test."""
    ready = os.environ.get("KLEASH_TEST_IMAGE")
    if not ready and not os.environ.get("KLEASH_TEST_IMAGE_BUILD"):
        pytest.skip("building the image takes minutes and 5 GB: `make test-image` asks for it")
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing or runtime() is None:
        pytest.skip("buildah, debootstrap, and runc or crun are needed: run `make apt-tools`")
    if os.geteuid() != 0:
        pytest.skip("only root can make a base with debootstrap and mount what buildah built")
    return ready or build("localhost/kleash-test:built")


def build(name: str) -> str:
    if subprocess.run(["buildah", "inspect", BASE], check=False, capture_output=True).returncode:
        subprocess.run(["sh", "k8s/image/debootstrap-base.sh", BASE], check=True, cwd=ROOT)
    environment = os.environ | {"KLEASH_IMAGE": name, "PYTHON": sys.executable}
    command = ["sh", "k8s/image/build.sh", "--build-arg", f"BASE_IMAGE={BASE}"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return name


def run(image: str, folder: Path, *arguments: str, entrypoint: str | None = None) -> str:
    """The output of a command that must succeed in a container."""
    folder.mkdir()
    program = None if entrypoint is None else [entrypoint]
    with Container(image, arguments, folder, entrypoint=program) as container:
        assert container.wait(120) == 0, container.output()
    return container.stdout.read_text()


def test_help_answers_for_a_user_that_the_image_does_not_know(image: str, tmp_path: Path) -> None:
    assert run(image, tmp_path / "help", "--help").startswith("usage: kleash COMMAND")


def test_the_image_says_what_it_is(image: str) -> None:
    config = image_config(image)
    assert config["User"] == "10001:0"
    assert config["Entrypoint"] == ["kleash"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Labels"]["org.opencontainers.image.title"] == "kleash"
    assert config["Labels"]["org.opencontainers.image.version"]
    assert "Healthcheck" not in config


LOOK = """
import importlib.util, json, os, pathlib, shutil, sys, sysconfig
import kleash.base.version, kubernetes, torch, transformers
package = pathlib.Path(kleash.base.version.__file__)
def may_write(folder):
    try:
        (pathlib.Path(folder) / "probe").touch()
    except OSError:
        return False
    return True
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "pid": os.getpid(),
    "capabilities": [line.split()[1] for line in open("/proc/self/status") if line[:3] == "Cap"],
    "tools": [name for name in ("pip", "pip3", "gcc", "cc", "ld", "make", "git")
              if shutil.which(name)],
    "modules": [name for name in ("pip", "setuptools", "hatchling", "ensurepip", "pytest")
                if importlib.util.find_spec(name)],
    "bytecode": pathlib.Path(importlib.util.cache_from_source(str(package))).exists(),
    "writable": [folder for folder in ("/", "/opt/kleash", "/etc", "/usr", "/cache", "/tmp")
                 if may_write(folder)],
    "opt": sorted(os.listdir("/opt")),
    "cuda": torch.version.cuda,
    "version": kleash.base.version.software_version(),
}))
"""


def test_what_is_in_it_and_what_is_not(image: str, tmp_path: Path) -> None:
    seen = json.loads(
        run(image, tmp_path / "look", "-c", LOOK, entrypoint="/opt/kleash/bin/python")
    )
    assert (seen["uid"], seen["gid"], seen["pid"]) == (UID, 0, 1)
    assert {int(mask, 16) for mask in seen["capabilities"]} == {0}
    assert seen["tools"] == []
    assert seen["modules"] == []
    assert seen["bytecode"]
    assert seen["writable"] == ["/cache", "/tmp"]
    assert seen["opt"] == ["kleash"]  # no mount point of the build is left
    assert seen["cuda"] is None
    assert seen["version"] == image_config(image)["Labels"]["org.opencontainers.image.version"]


# -- A service


@pytest.fixture
def server(
    image: str, tiny_reward_folder: Path, tmp_path: Path
) -> Iterator[tuple[Container, int, int]]:
    """`kleash serve reward` in a container, its gRPC port and its health port; ready."""
    port, health_port = free_ports(2)
    settings = {
        "server": {
            "host": "127.0.0.1",
            "port": port,
            "health_port": health_port,
            "drain_delay_s": DRAIN_DELAY_S,
            "drain_grace_s": 20,
        },
        "reward": {"model": "/models/reward", "device": "cpu", "num_threads": 1},
    }
    bundle, etc = tmp_path / "bundle", tmp_path / "etc"
    bundle.mkdir()
    etc.mkdir()
    (etc / "serve.json").write_text(json.dumps(settings))
    volumes = {"/models/reward": tiny_reward_folder, "/etc/kleash": etc}
    arguments = ["serve", "reward", "/etc/kleash/serve.json"]
    with Container(image, arguments, bundle, volumes=volumes) as container:
        wait_until(lambda: health(health_port, SERVICE) == "SERVING", 120, container)
        yield container, port, health_port


def health(port: int, service: str) -> str:
    """The answer of the health service, or the status of the call that failed."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=3)
        except grpc.RpcError as error:
            call: Any = error
            return call.code().name
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def wait_until(condition: Callable[[], bool], timeout_s: float, container: Container) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert container.process.poll() is None, container.output()
        assert time.monotonic() < end, container.output()
        time.sleep(0.1)


def test_a_service_scores_and_drains_at_sigterm(
    server: tuple[Container, int, int], tiny_reward_folder: Path
) -> None:
    container, port, health_port = server
    with RewardClient(f"127.0.0.1:{port}") as client:
        (score,) = client.score_texts(["what is 2 + 2? 4."])
    assert math.isfinite(score.score)
    assert score.revision == model_digest(load_sequence_classifier(tiny_reward_folder))

    container.signal(signal.SIGTERM)
    stopped = time.monotonic()
    wait_until(lambda: health(health_port, SERVICE) == "NOT_SERVING", DRAIN_DELAY_S, container)
    assert late_score(port).code == common_pb2.ITEM_STATUS_CODE_OK
    assert container.wait(30) == 0, container.output()
    assert time.monotonic() - stopped >= DRAIN_DELAY_S


def late_score(port: int) -> reward_pb2.ScoreResult:
    """As a caller that has not noticed yet; kleash's client watches health and calls no more."""
    request = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(text="while it drains")])
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        return reward_pb2_grpc.RewardServiceStub(channel).Score(request, timeout=10).results[0]


def test_a_command_that_waits_obeys_sigterm_as_process_1(image: str, tmp_path: Path) -> None:
    """The kernel drops signals of process 1 that it has no handler for: a pod would hang 30 s."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    arguments = ["fetch", "/runs/demo/sft", "--wait_s=600"]
    with Container(image, arguments, bundle) as container:
        wait_until(lambda: container.output().strip() != "", 60, container)
        container.signal(signal.SIGTERM)
        assert container.wait(10) == 128 + signal.SIGTERM, container.output()
