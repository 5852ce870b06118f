"""``kleash fetch`` of folders on this machine: waiting, copying once, never half of a model."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kleash.base.errors import ModelError, UserError
from kleash.base.lock_file import take_lock
from kleash.cli.main import main
from kleash.sources import copying, waiting
from kleash.sources import fetch as fetching
from kleash.sources.errors import NoSpaceError, SourceUnavailable
from kleash.sources.fetch import FetchConfig, Fetched, fetch

pytestmark = pytest.mark.unit


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder of the test's own."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def fetch_to(out: Path, source: object, **keys: object) -> Fetched:
    return fetch(FetchConfig.model_validate({"source": str(source), "out": out, **keys}))


# ----------------------------------------------------------------------------------------- waiting


def test_a_complete_folder_is_found_at_once_and_nothing_is_copied(model: Path) -> None:
    before = sorted(model.parent.rglob("*"))
    fetched = fetch(FetchConfig(source=str(model), wait_s=60))
    assert (fetched.folder, fetched.is_new, fetched.num_files) == (model, False, 6)
    assert sorted(model.parent.rglob("*")) == before


def test_a_folder_that_somebody_fills_is_waited_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(waiting, "TELL_EVERY_S", 0.1)
    growing = tmp_path / "growing"
    seen: list[int] = []

    def fill() -> None:
        time.sleep(0.3)
        growing.mkdir()
        for path in sorted(model.iterdir()):
            time.sleep(0.15)
            shutil.copy(path, growing)
            seen.append(1)

    writer = threading.Thread(target=fill)
    writer.start()
    with caplog.at_level(logging.INFO, "kleash.sources.waiting"):
        fetch(FetchConfig(source=str(growing), wait_s=30))
    assert len(seen) >= len(list(model.iterdir())) - 1
    writer.join()
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith(f"waiting for {growing}: the folder does not exist (0 of 30 s)")
    assert any("no tokenizer (tokenizer.json)" in line for line in told)


def test_time_that_runs_out_is_a_failure_of_somebody_else(tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match=r"after 0.1 s: the folder does not exist; see whe"):
        fetch(FetchConfig(source=str(tmp_path / "none"), wait_s=0.1))
    with pytest.raises(ModelError, match="wait for it with --wait_s=SECONDS"):
        fetch(FetchConfig(source=str(tmp_path / "none")))


def test_a_folder_of_kleash_is_waited_for_until_its_lineage_is_there(model: Path) -> None:
    config = FetchConfig(source=str(model), wait_s=0.1, needs_lineage=True)
    with pytest.raises(SourceUnavailable, match=r"no kleash\.json"):
        fetch(config)
    (model / "kleash.json").write_text(json.dumps({"files": ["config.json"]}))
    assert fetch(config).folder == model


def test_sigterm_ends_a_wait_of_process_one_too(tmp_path: Path) -> None:
    """In a container nobody else handles the signal for it."""
    command = [sys.executable, "-m", "kleash.cli", "fetch", str(tmp_path / "none"), "--wait_s=60"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr:
        assert "the folder does not exist" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == "error: ended by SIGTERM.\n"
    assert process.wait(10) == 143


# ----------------------------------------------------------------------------------------- copying


def test_a_copy_is_complete_and_says_where_it_came_from(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"not wanted")
    (model / "deep").mkdir()
    out = tmp_path / "deep" / "copy"
    fetched = fetch_to(out, model)
    assert fetched.is_new
    names = sorted(path.name for path in out.iterdir())
    wanted = {"pytorch_model.bin", "deep"}
    assert names == sorted({p.name for p in model.iterdir()} - wanted | {"kleash-fetch.json"})
    for name in set(names) - {"kleash-fetch.json"}:
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert not out.with_name("copy.partial").exists()

    marker = json.loads((out / "kleash-fetch.json").read_text())
    assert marker["source"] == str(model)
    lines = subprocess.run(
        ["sha256sum", *sorted(set(names) - {"kleash-fetch.json"})],
        cwd=out, capture_output=True, check=True,
    ).stdout  # fmt: skip
    hashed = subprocess.run(["sha256sum"], input=lines, capture_output=True, check=True).stdout
    assert hashed.split()[0].decode() == marker["sha256"] == fetched.sha256
    sizes = {entry["name"]: entry["bytes"] for entry in marker["files"]}
    assert sizes["model.safetensors"] == (model / "model.safetensors").stat().st_size


def test_a_second_fetch_does_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    first = fetch_to(out, model)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    shutil.move(model / "config.json", tmp_path)  # what the source has now is not looked at
    shutil.copy(tmp_path / "config.json", model)
    second = fetch_to(out, model)
    assert (second.is_new, second.sha256) == (False, first.sha256)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_another_source_is_refused_and_nothing_is_lost(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    fetch_to(out, model)
    other = shutil.copytree(model, tmp_path / "other")
    with pytest.raises(UserError, match=rf"holds {model}, and not {other}; choose another --out"):
        fetch_to(out, other)
    with pytest.raises(UserError, match="exists and no fetch made it"):
        fetch_to(other, model)
    assert (other / "config.json").exists()


def test_a_damaged_copy_is_made_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    fetch_to(out, model)
    (out / "model.safetensors").write_bytes(b"short")
    fetched = fetch_to(out, model)
    assert fetched.is_new
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (model / weights).read_bytes()


def test_what_a_killed_fetch_left_is_used_if_it_still_fits(model: Path, tmp_path: Path) -> None:
    """The plan names what each beginning belongs to; a file of another source would be wrong."""
    out = tmp_path / "copy"
    partial = tmp_path / "copy.partial"
    partial.mkdir()
    (partial / ".plan.json").write_text(json.dumps({"source": "s3://x", "fingerprints": {}}))
    (partial / "config.json").write_text("not of this source")
    (partial / "stray.json").write_text("{}")
    fetch_to(out, model)
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert not (out / "stray.json").exists()


def test_a_source_that_is_not_complete_leaves_nothing(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not valid JSON"):
        fetch_to(tmp_path / "copy", model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        fetch_to(tmp_path / "copy", model)
    assert not (tmp_path / "copy").exists()
    assert not (tmp_path / "copy.partial").exists()


def test_the_hash_is_checked_wherever_the_folder_is(model: Path, tmp_path: Path) -> None:
    sha256 = fetch_to(tmp_path / "copy", model).sha256
    assert fetch(FetchConfig(source=str(model), sha256=sha256)).sha256 == sha256
    fetch_to(tmp_path / "again", model, sha256=sha256)
    wrong = "0" * 64
    for out in (None, tmp_path / "copy", tmp_path / "new"):
        with pytest.raises(ModelError, match=f"has the hash {sha256}, and --sha256 is {wrong}"):
            fetch(FetchConfig(source=str(model), out=out, sha256=wrong))
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "new.partial").exists()


def test_two_fetches_of_one_folder_do_not_meet(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "copy"
    lock = take_lock(tmp_path / ".copy.lock")
    with pytest.raises(SourceUnavailable, match=rf"another fetch works on .*process {os.getpid()}"):
        fetch_to(out, model)
    release = threading.Timer(0.5, os.close, [lock])
    release.start()
    with caplog.at_level(logging.INFO, "kleash.sources.fetch"):
        assert fetch_to(out, model, wait_s=30).is_new
    release.join()
    assert any("waiting for another fetch of" in record.getMessage() for record in caplog.records)


def test_links_are_followed(model: Path, tmp_path: Path) -> None:
    """As in the cache of the Hub's own library."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in model.iterdir():
        (linked / path.name).symlink_to(path)
    fetch_to(tmp_path / "copy", linked)
    assert not (tmp_path / "copy" / "model.safetensors").is_symlink()


def test_any_fsspec_driver_works(model: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in model.iterdir():
        memory.pipe_file(f"/fetched/{path.name}", path.read_bytes())
    fetch_to(tmp_path / "copy", "memory://fetched")
    weights = "model.safetensors"
    assert (tmp_path / "copy" / weights).read_bytes() == (model / weights).read_bytes()
    with pytest.raises(UserError, match="memory://nowhere does not exist"):
        fetch_to(tmp_path / "other", "memory://nowhere")
    memory.rm("/fetched", recursive=True)


# ---------------------------------------------------------------------------------------- refusals


def test_a_full_volume_is_found_before_the_first_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    size = sum(path.stat().st_size for path in model.iterdir()) / 1e3
    with pytest.raises(NoSpaceError) as caught:
        fetch_to(tmp_path / "copy", model)
    volume = next(path for path in tmp_path.parents if path.is_mount())
    assert str(caught.value) == (
        f"the volume {volume} leaves no room for the model in {tmp_path}: {size:.2f} kB more are "
        "needed, and 1.00 kB are free; enlarge the volume or free some."
    )


@pytest.mark.parametrize(
    ("number", "beginning"), [(errno.ENOSPC, "the volume /"), (errno.EDQUOT, "a quota on the volu")]
)
def test_a_volume_that_others_fill_meanwhile_may_be_tried_again(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    beginning: str,
) -> None:
    """Status 1: 2 is for what another try cannot mend, and a Job is given up at it."""

    def write(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(copying._Writer, "write", write)
    assert main(["fetch", str(model), f"--out={tmp_path / 'copy'}"]) == 1
    sentence = capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")
    size = sum(path.stat().st_size for path in model.iterdir()) / 1e3
    assert sentence.startswith(beginning)
    assert f"leaves no room for the model in {tmp_path}: {size:.2f} kB more are" in sentence


def test_a_small_volume_is_named(model: Path, tmp_path: Path) -> None:
    """A real one: its last bytes go to a file that is written with the model."""
    volume = tmp_path / "volume"
    volume.mkdir()
    script = (
        'mount -t tmpfs -o size=300k none "$1" && head -c 250000 /dev/zero >"$1/other" &&'
        ' exec "$2" -m kleash.cli fetch "$3" --out="$1/copy"'
    )
    arguments = [str(volume), sys.executable, str(model)]
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *arguments]
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("mounting a volume needs root and unshare")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"the volume {volume} leaves no room for the model in {volume}: " in done.stderr


def test_a_volume_that_fills_up_is_one_sentence(model: Path, tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does, at the write."""
    code = (
        "import resource, signal, sys; from kleash.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "sys.exit(main(['fetch', sys.argv[1], '--out', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "copy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: cannot write {tmp_path} (File too large); choose another --out."
    )
    assert (tmp_path / "copy.partial" / "config.json").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(model: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*config\.json .*choose another --out"):
        fetch_to(model / "config.json" / "copy", model)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "'source' is required"),
        (["s3://bucket/x"], "s3://bucket/x has to be fetched to somewhere; give --out=FOLDER"),
        (["x", "--wait=3"], "unknown key 'wait'; did you mean 'wait_s'?"),
        (["x", "--sha256=abc"], "'sha256': "),
        (["demo://sft"], "the chart mounts into its pods"),
    ],
)
def test_bad_input_is_status_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_prints_what_there_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fetch", str(model), f"--out={tmp_path / 'copy'}"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith(f"fetched: {tmp_path / 'copy'} (6 files, 0.2 MB, sha256 ")
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.replace("fetched", "complete")
