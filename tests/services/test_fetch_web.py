"""``kleash fetch https://...`` from a real web server: resumed, and never wrong in silence."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.services.model_servers import FileServer

from kleash.base.errors import ModelError, UserError
from kleash.sources import copying
from kleash.sources import fetch as fetching
from kleash.sources.errors import SourceUnavailable
from kleash.sources.fetch import FetchConfig, Fetched, fetch

pytestmark = pytest.mark.services

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "served")


@pytest.fixture
def server(model: Path) -> Iterator[FileServer]:
    with FileServer(model) as server:
        yield server


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(fetching, "TRY_AGAIN_S", 0.1)


def fetch_to(out: Path, server: FileServer, **keys: object) -> Fetched:
    source = f"{server.address}/models/sft/"
    return fetch(FetchConfig.model_validate({"source": source, "out": out, **keys}))


def assert_same(out: Path, model: Path) -> None:
    names = {path.name for path in model.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {"kleash-fetch.json"}
    assert all((out / name).read_bytes() == (model / name).read_bytes() for name in names)


def test_every_file_of_a_checkpoint_is_found(
    server: FileServer, model: Path, tmp_path: Path
) -> None:
    assert fetch_to(tmp_path / "out", server).is_new
    assert_same(tmp_path / "out", model)
    num_requests = len(server.requests)
    assert not fetch_to(tmp_path / "out", server).is_new
    assert len(server.requests) == num_requests


def test_shards_are_found_through_the_index(
    server: FileServer, model: Path, tmp_path: Path
) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for shard in shards:
        shutil.copy(model / WEIGHTS, model / shard)
    (model / WEIGHTS).unlink()
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    fetch_to(tmp_path / "out", server)
    assert_same(tmp_path / "out", model)
    (model / shards[1]).unlink()
    with pytest.raises(ModelError, match=rf"is no complete checkpoint: no {shards[1]}"):
        fetch_to(tmp_path / "other", server)


@pytest.mark.parametrize(
    "kind", [{"knows_ranges": False}, {"tells_length": False}, {"forbids_head": True}]
)
def test_simple_servers(model: Path, tmp_path: Path, kind: dict[str, bool]) -> None:
    with FileServer(model, **kind) as server:
        server.faults.cut_after[WEIGHTS] = [1000, 2000] if server.tells_length else []
        fetch_to(tmp_path / "out", server)
    assert_same(tmp_path / "out", model)


def test_a_store_that_answers_403_for_what_is_not_there(model: Path, tmp_path: Path) -> None:
    with FileServer(model, unknown_status=403) as server:
        fetch_to(tmp_path / "out", server)
        assert_same(tmp_path / "out", model)
        (model / "config.json").unlink()
        with pytest.raises(UserError, match="may not be read with these credentials"):
            fetch_to(tmp_path / "other", server)


def test_a_broken_connection_is_taken_up_where_it_broke(
    server: FileServer, model: Path, tmp_path: Path
) -> None:
    server.faults.cut_after[WEIGHTS] = [50_000, 30_000, 0, 0]
    fetch_to(tmp_path / "out", server)
    assert_same(tmp_path / "out", model)
    assert server.starts_of(WEIGHTS) == [0, 50_000, 80_000, 80_000, 80_000]


def test_a_file_that_is_shorter_than_announced_is_never_taken(
    server: FileServer, model: Path, tmp_path: Path
) -> None:
    server.faults.missing_bytes[WEIGHTS] = 7
    size = (model / WEIGHTS).stat().st_size
    with pytest.raises(SourceUnavailable, match=rf"{WEIGHTS}"):
        fetch_to(tmp_path / "out", server)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / WEIGHTS).stat().st_size == size - 7
    server.faults.missing_bytes.clear()
    fetch_to(tmp_path / "out", server)
    assert server.starts_of(WEIGHTS)[-1] == size - 7
    assert_same(tmp_path / "out", model)


def test_weights_that_are_cut_on_the_server_are_no_checkpoint(
    server: FileServer, model: Path, tmp_path: Path
) -> None:
    """Announced and sent as they are: only their header knows that they should be longer."""
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[:-5])
    with pytest.raises(
        ModelError, match=rf"{WEIGHTS} has {len(content) - 5} of {len(content)} bytes"
    ):
        fetch_to(tmp_path / "out", server)
    assert not (tmp_path / "out.partial").exists()
    (model / WEIGHTS).write_bytes(content)
    fetch_to(tmp_path / "out", server)
    assert_same(tmp_path / "out", model)


def test_a_killed_fetch_goes_on_where_it_was(
    server: FileServer, model: Path, tmp_path: Path
) -> None:
    server.faults.stall_after[WEIGHTS] = 100_000
    out = tmp_path / "out"
    command = [sys.executable, "-m", "kleash.cli", "fetch", f"{server.address}/m", f"--out={out}"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    assert server.faults.stalled.wait(60)
    partial = tmp_path / "out.partial" / WEIGHTS
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = partial.stat().st_size
    assert 0 < there <= 100_000
    assert not out.exists()
    server.faults.stall_after.clear()
    server.faults.resume.set()
    server.requests.clear()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert server.starts_of(WEIGHTS) == [there]
    assert_same(out, model)


def test_a_file_that_changed_since_is_fetched_from_its_start(
    server: FileServer, model: Path, tmp_path: Path
) -> None:
    server.faults.missing_bytes[WEIGHTS] = 50_000
    with pytest.raises(SourceUnavailable):
        fetch_to(tmp_path / "out", server)
    server.faults.missing_bytes.clear()
    content = bytearray((model / WEIGHTS).read_bytes())
    content[-60_000] ^= 1
    (model / WEIGHTS).write_bytes(content)
    server.requests.clear()
    fetch_to(tmp_path / "out", server)
    assert server.starts_of(WEIGHTS) == [0]
    assert_same(tmp_path / "out", model)


def test_nobody_answers(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/m"
        with pytest.raises(SourceUnavailable, match=r"cannot read .*Connection refused"):
            fetch(FetchConfig(source=address, out=tmp_path / "out"))
    command = [sys.executable, "-m", "kleash.cli", "fetch", address, f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot read {address}/")


def test_a_server_that_comes_up_is_waited_for(model: Path, tmp_path: Path) -> None:
    with FileServer(model) as server:
        server.faults.status = {"config.json": [500, 503]}
        with pytest.raises(SourceUnavailable, match="the server answered 500"):
            fetch_to(tmp_path / "out", server)
        fetch_to(tmp_path / "out", server, wait_s=30)
    assert_same(tmp_path / "out", model)


def test_what_is_no_model_is_said_so(server: FileServer, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has pickled weights alone \(pytorch_model\.bin\)"):
        fetch_to(out, server)
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors weights"):
        fetch_to(out, server)
    for path in model.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        fetch_to(out, server)
    with pytest.raises(UserError, match="give the folder's plain address"):
        fetch(FetchConfig(source=f"{server.address}/m?x=1", out=out))
    assert not out.exists()
