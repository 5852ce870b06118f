"""``kleash fetch`` from a source that takes the call and never answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.services.signals import hears_ctrl_c
from tests.services.silent_server import SilentServer

from kleash.sources.remote import GCS_RETRY_S, _with_limit

pytestmark = pytest.mark.services

WAIT_S = 60.0
CLI = (sys.executable, "-m", "kleash.cli")


@pytest.fixture
def silent() -> Iterator[SilentServer]:
    with SilentServer() as server:
        yield server


def uri_of(silent: SilentServer) -> str:
    """pyarrow asks it in C++, without the interpreter's lock, for two minutes."""
    return f"gs://anonymous@bucket/model?scheme=http&endpoint_override={silent.address}"


@contextmanager
def fetching(
    silent: SilentServer, out: Path, *more: str, command: tuple[str, ...] = CLI
) -> Iterator[subprocess.Popen[str]]:
    """The command, in a call that does not return."""
    arguments = [*command, "fetch", uri_of(silent), f"--out={out}", *more]
    # Outside of Google's cloud nothing answers for its machines' accounts.
    env = os.environ | {"GCE_METADATA_HOST": silent.address}
    process = subprocess.Popen(
        arguments,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,  # noqa: PLW1509 (one system call, no locks)
    )
    with process:
        try:
            assert silent.was_called.wait(WAIT_S)
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, text = process.communicate(timeout=WAIT_S)
    assert "Traceback" not in text
    return process.returncode, text.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(signal.SIGTERM, "error: ended by SIGTERM."), (signal.SIGINT, "error: interrupted.")],
)
def test_a_signal_ends_a_fetch_that_hangs(
    silent: SilentServer, tmp_path: Path, number: signal.Signals, sentence: str
) -> None:
    with fetching(silent, tmp_path / "out", "--wait_s=900") as process:
        process.send_signal(number)
        assert end_of(process) == (128 + number, sentence)


def test_a_second_signal_does_not_wait_for_the_first(silent: SilentServer, tmp_path: Path) -> None:
    """Of a fetch that gives the hanging call all the time in the world."""
    code = (
        "import sys; from kleash.cli.main import main; from kleash.sources import patience\n"
        "patience.LEAVE_S = 600\n"
        "sys.exit(main())"
    )
    with fetching(silent, tmp_path / "out", command=(sys.executable, "-c", code)) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        line = "error: ended at once by a second signal, SIGTERM."
        assert end_of(process) == (143, line)


def test_the_wait_ends_though_the_call_does_not(silent: SilentServer, tmp_path: Path) -> None:
    code = (
        "import sys; from kleash.cli.main import main; from kleash.sources import patience\n"
        "patience.SILENCE_S, patience.LEAVE_S = 0.5, 0.1\n"
        "sys.exit(main())"
    )
    command = (sys.executable, "-c", code)
    with fetching(silent, tmp_path / "out", "--wait_s=1", command=command) as process:
        status, sentence = end_of(process)
    assert status == 3
    assert sentence == (
        f"error: {uri_of(silent)} took the call and was silent for 0.5 s, 1 s of waiting included; "
        "see whether it answers other clients and whether a proxy is in between, or wait longer "
        "with --wait_s."
    )


def test_what_arrived_stays_and_the_lock_is_free(silent: SilentServer, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    for _ in range(2):
        silent.was_called.clear()
        with fetching(silent, tmp_path / "out") as process:
            process.terminate()
            assert end_of(process)[0] == 143
    assert (partial / "model.safetensors").read_bytes() == b"half"


@pytest.mark.parametrize(
    ("uri", "limited"),
    [
        ("gs://b/m", f"gs://b/m?retry_limit_seconds={GCS_RETRY_S}"),
        ("gcs://b/m?scheme=http", f"gs://b/m?scheme=http&retry_limit_seconds={GCS_RETRY_S}"),
        ("gs://b/m?retry_limit_seconds=9", "gs://b/m?retry_limit_seconds=9"),
        ("s3://b/m", "s3://b/m"),
    ],
)
def test_googles_retries_are_limited(uri: str, limited: str) -> None:
    assert _with_limit(uri) == limited
