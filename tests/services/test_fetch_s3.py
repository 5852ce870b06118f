"""``kleash fetch s3://...`` from a real S3 server (moto), with the AWS environment's variables."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import fs
from safetensors.numpy import save_file

from kleash.up.supervisor import free_port

pytestmark = pytest.mark.services

SERVER = Path(__file__).parents[2] / "build" / "s3-server" / "bin" / "moto_server"
WEIGHTS = "model.safetensors"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class Store:
    """A running server and a bucket in it."""

    address: str
    files: Any

    def upload(self, folder: Path, place: str) -> None:
        for path in folder.iterdir():
            with self.files.open_output_stream(f"{place}/{path.name}") as stream:
                stream.write(path.read_bytes())

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return kept | CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://{self.address}"} | more


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    if not SERVER.exists():
        pytest.skip("no S3 server here; make test installs one, or make build/s3-server/.installed")
    address = f"127.0.0.1:{(port := free_port())}"
    command = [str(SERVER), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://{address}/moto-api/", process)
        files = fs.S3FileSystem(
            access_key="key", secret_key="secret", region="us-east-1", scheme="http",
            endpoint_override=address, allow_bucket_creation=True,
        )  # fmt: skip
        files.create_dir("models")
        yield Store(address, files)
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.1)


def fetch(store: Store, uri: str, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process: the store's library reads its environment once."""
    command = [sys.executable, "-m", "kleash.cli", "fetch", uri, f"--out={out}"]
    env = store.environment(**variables)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def error_of(done: subprocess.CompletedProcess[str], status: int) -> str:
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1].removeprefix("error: ")


def test_a_folder_of_a_bucket(store: Store, tiny_folder: Path, tmp_path: Path) -> None:
    store.upload(tiny_folder, "models/team/sft")
    store.upload(tiny_folder, "models/team/sft/checkpoint-1")  # a folder below is another model
    out = tmp_path / "out"
    done = fetch(store, "s3://models/team/sft", out)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tiny_folder.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"kleash-fetch.json"}
    assert all((out / name).read_bytes() == (tiny_folder / name).read_bytes() for name in names)
    assert fetch(store, "s3://models/team/sft", out).stdout.startswith(f"complete: {out} (")


def test_a_folder_of_kleash_stays_one(
    store: Store, tiny_reward_folder: Path, tmp_path: Path
) -> None:
    """kleash.json decides how a reward model's conversations end: it must not get lost."""
    store.upload(tiny_reward_folder, "models/reward")
    out = tmp_path / "out"
    assert fetch(store, "s3://models/reward/", out).returncode == 0
    lineage = "kleash.json"
    assert (out / lineage).read_bytes() == (tiny_reward_folder / lineage).read_bytes()


def test_large_weights_arrive_in_order_and_a_killed_fetch_goes_on(
    store: Store, tiny_folder: Path, tmp_path: Path
) -> None:
    """Several requests at a time: 60 MB are more than one round of them."""
    store.upload(tiny_folder, "models/large")
    rng = np.random.default_rng(0)
    save_file({"w": rng.integers(0, 256, 60 * 10**6, dtype=np.uint8)}, tmp_path / WEIGHTS)
    content = (tmp_path / WEIGHTS).read_bytes()
    with store.files.open_output_stream(f"models/large/{WEIGHTS}") as stream:
        stream.write(content)
    out, partial = tmp_path / "out", tmp_path / "out.partial" / WEIGHTS
    command = [sys.executable, "-m", "kleash.cli", "fetch", "s3://models/large", f"--out={out}"]
    process = subprocess.Popen(command, env=store.environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.stat().st_size:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    there = partial.stat().st_size
    assert 0 < there < len(content)
    assert partial.read_bytes() == content[:there]
    inode = partial.stat().st_ino
    done = fetch(store, "s3://models/large", out)
    assert done.returncode == 0, done.stderr
    assert (out / WEIGHTS).read_bytes() == content
    assert (out / WEIGHTS).stat().st_ino == inode


def test_what_is_wrong_is_one_sentence(store: Store, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sentence = error_of(fetch(store, "s3://nobucket/x", out), 2)
    assert sentence.startswith("s3://nobucket/x does not exist; check the address")
    sentence = error_of(fetch(store, "s3://models/nowhere", out), 2)
    assert sentence.startswith("s3://models/nowhere does not exist")
    store.upload(tiny_folder, "models/file")
    sentence = error_of(fetch(store, f"s3://models/file/{WEIGHTS}", out), 2)
    assert sentence == f"s3://models/file/{WEIGHTS} is a file; give the folder that it is in."
    sentence = error_of(fetch(store, "s3://models/a b", out), 2)
    assert "is no address that pyarrow reads" in sentence
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    for variables in (nobody, nobody | {"AWS_REGION": ""}):
        done = fetch(store, "s3://models/file", out, **variables)
        assert error_of(done, 3).startswith("cannot read s3://models/file (")
    assert not out.exists()


def test_credentials_that_are_refused(store: Store, tiny_folder: Path, tmp_path: Path) -> None:
    """moto checks signatures and rights once it is told to."""
    store.upload(tiny_folder, "models/secret")
    api = f"http://{store.address}/moto-api/reset-auth"

    def allow(num_requests: int) -> None:
        body = str(num_requests).encode()
        request = urllib.request.Request(
            api, data=body, headers={"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(request, timeout=10).close()

    allow(0)
    try:
        sentence = error_of(fetch(store, "s3://models/secret", tmp_path / "out"), 2)
    finally:
        allow(10**9)
    assert "s3://models/secret may not be read with these credentials (" in sentence
    assert "give credentials in the environment (AWS_ACCESS_KEY_ID and" in sentence
