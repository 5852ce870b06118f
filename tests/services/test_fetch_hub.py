"""``kleash fetch hf://...`` against a server that speaks the Hub's API, named by HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.services.model_servers import COMMIT, FileServer, Hub

pytestmark = pytest.mark.services

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_folder, tmp_path / "served")
    (folder / "README.md").write_text("not needed")
    (folder / "pytorch_model.bin").write_bytes(b"never wanted")
    return folder


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with Hub(model) as hub:
        yield hub


def command_of(uri: str, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "kleash.cli", "fetch", uri, f"--out={out}", *more]


def environment(hub: FileServer, tmp_path: Path, **more: str) -> dict[str, str]:
    """The library reads it at import: every fetch here is a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    home = str(tmp_path / "cache")
    return kept | {"HF_ENDPOINT": hub.address, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"} | more


def fetch(
    hub: FileServer, tmp_path: Path, uri: str, *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = command_of(uri, tmp_path / "out", *more)
    env = environment(hub, tmp_path, **variables)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence, on the last line."""
    assert done.returncode in (2, 3), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1].removeprefix("error: ")


def assert_fetched(out: Path, model: Path) -> None:
    wanted = {path.name for path in model.iterdir()} - {"README.md", "pytorch_model.bin"}
    assert {path.name for path in out.iterdir()} == wanted | {"kleash-fetch.json"}
    assert all((out / name).read_bytes() == (model / name).read_bytes() for name in wanted)


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", COMMIT])
def test_a_model_at_a_revision(hub: Hub, model: Path, tmp_path: Path, revision: str) -> None:
    uri = f"hf://org/model@{revision}"
    done = fetch(hub, tmp_path, uri)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert done.stdout.startswith(f"fetched: {out} (6 files, ")
    assert_fetched(out, model)
    marker = json.loads((out / "kleash-fetch.json").read_text())
    assert (marker["source"], marker["revision"]) == (uri, COMMIT)
    assert not any("pytorch_model.bin" in asked.path for asked in hub.requests)

    num_requests = len(hub.requests)
    assert fetch(hub, tmp_path, uri).stdout == done.stdout.replace("fetched", "complete")
    assert len(hub.requests) == num_requests
    assert "another --out" in error_of(fetch(hub, tmp_path, "hf://org/model@other"))


def test_a_killed_download_goes_on_where_it_was(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.faults.stall_after[WEIGHTS] = 100_000
    env, command = environment(hub, tmp_path), command_of("hf://org/model@main", tmp_path / "out")
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    partial = tmp_path / "out.partial" / WEIGHTS
    assert hub.faults.stalled.wait(60)
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = partial.stat().st_size
    assert 0 < there <= 100_000
    hub.faults.stall_after.clear()
    hub.faults.resume.set()
    hub.requests.clear()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_fetched(tmp_path / "out", model)
    assert hub.starts_of(WEIGHTS) == [there]


def test_a_token_is_sent_to_the_hub_alone(model: Path, tmp_path: Path) -> None:
    """Large files come from elsewhere, as the real Hub's do: that server needs no token of ours."""
    with FileServer(model) as elsewhere, Hub(model, token="hf_secret") as hub:
        hub.large_files_at = f"{elsewhere.address}/store"
        sentence = error_of(fetch(hub, tmp_path, "hf://org/model@main"))
        assert sentence.startswith("hf://org/model@main does not exist (or it is private: set HF_")
        assert error_of(fetch(hub, tmp_path, "hf://org/model@main", HF_TOKEN="hf_wrong"))
        elsewhere.faults.cut_after[WEIGHTS] = [1000]
        done = fetch(hub, tmp_path, "hf://org/model@main", HF_TOKEN="hf_secret")
        assert done.returncode == 0, done.stderr
        assert "hf_secret" not in done.stdout + done.stderr
    assert_fetched(tmp_path / "out", model)
    assert [(asked.start, asked.token) for asked in elsewhere.requests] == [(0, ""), (1000, "")]


def test_a_gated_model_names_the_remedy(model: Path, tmp_path: Path) -> None:
    with Hub(model, token="hf_secret", is_gated=True) as hub:
        done = fetch(hub, tmp_path, "hf://org/model@main")
    sentence = error_of(done)
    assert done.returncode == 2
    assert "may not be read with these credentials" in sentence
    assert "set HF_TOKEN to a token that may, and accept the model's terms on its page" in sentence


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    sentence = error_of(fetch(hub, tmp_path, "hf://org/model@nowhere"))
    assert sentence == (
        "hf://org/model has no revision 'nowhere'; give a commit, branch or tag that the "
        "repository's page lists."
    )
    assert "hf://org/none@main does not exist" in error_of(
        fetch(hub, tmp_path, "hf://org/none@main")
    )


def test_pickled_weights_alone_are_refused(hub: Hub, model: Path, tmp_path: Path) -> None:
    (model / WEIGHTS).unlink()
    sentence = error_of(fetch(hub, tmp_path, "hf://org/model@main"))
    assert "has pickled weights alone (pytorch_model.bin), which can run code" in sentence
    assert not any("resolve" in asked.path for asked in hub.requests)


def test_bytes_that_are_not_what_the_hub_says_are_not_taken(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.told_sha256[WEIGHTS] = "ab" * 32
    done = fetch(hub, tmp_path, "hf://org/model@main")
    sha256 = hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest()
    assert error_of(done) == (
        f"cannot use {WEIGHTS} (what arrived hashes to sha256:{sha256} and not to "
        f"sha256:{'ab' * 32}); fetch it again, and upload it again if it stays so."
    )
    assert done.returncode == 3
    assert not (tmp_path / "out").exists()
    hub.told_sha256.clear()
    assert fetch(hub, tmp_path, "hf://org/model@main").returncode == 0
    assert_fetched(tmp_path / "out", model)


def test_a_hub_that_does_not_answer(hub: Hub, model: Path, tmp_path: Path) -> None:
    refused = environment(hub, tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = command_of("hf://org/model@main", tmp_path / "out")
    done = subprocess.run(command, env=refused, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert error_of(done).startswith("cannot read hf://org/model@main (")
    offline = fetch(hub, tmp_path, "hf://org/model@main", HF_HUB_OFFLINE="1")
    assert error_of(offline) == (
        "hf://org/model@main cannot be fetched, as HF_HUB_OFFLINE is set; unset it, or give a "
        "folder that holds the model."
    )
    assert offline.returncode == 2
