"""``kleash watch`` and ``kleash trainer`` as processes: lines, JSON, keys, restarts, refusals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.services.doubler import WAIT_S, Doubler, eventually, free_port
from tests.services.live_run import LiveRun, serving_run

from kleash.ppo.control import RunState
from kleash.rpc.server import BackgroundServer
from kleash.rpc.static_tokens import make_token

pytestmark = pytest.mark.services

KLEASH = [sys.executable, "-m", "kleash.cli"]


def kleash(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KLEASH, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


class Watch:
    """A ``kleash watch`` that is read line by line."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*KLEASH, "watch", *arguments], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self._lines = self.process.stdout

    def line(self) -> str:
        return self._lines.readline().rstrip("\n")

    def until(self, words: str) -> str:
        while line := self.line():
            if words in line:
                return line
        raise AssertionError(f"it has ended without {words!r}")


@contextmanager
def watching(*arguments: str) -> Iterator[Watch]:
    watch = Watch(*arguments)
    try:
        yield watch
    finally:
        watch.process.kill()
        watch.process.communicate()


@pytest.fixture
def run() -> Iterator[LiveRun]:
    run = LiveRun()
    yield run
    run.end()


def test_a_pipe_gets_a_line_for_each_step_and_the_outcome(run: LiveRun) -> None:
    with serving_run(run) as server, watching(server.address, "--from_step=2") as watch:
        assert watch.line() == "a-run: running at step 3 of 1000"
        assert watch.line() == (
            "step 2/1000  score 0.5  kl 0.25  reward 0.4  1.5 s a step, 25 min left"
        )
        assert watch.line().startswith("step 3/1000 ")
        run.control.pause()
        assert watch.line() == "a-run: paused after step 3 of 1000"
        run.advance(3)
        assert watch.line().startswith("step 4/1000 ")
        run.control.resume()
        assert watch.until("step 6/1000")
        run.control.stop()
        run.advance()
        assert watch.until("stopped") == "stopped after step 7 of 1000; kleash ppo --resume goes on"
        assert watch.line() == ""
        assert watch.process.wait(WAIT_S) == 0


def test_json_holds_every_figure(run: LiveRun) -> None:
    with serving_run(run) as server, watching(server.address, "--json") as watch:
        first = json.loads(watch.line())
        assert (first["event"], first["step"], first["total_steps"]) == ("run", 3, 1000)
        run.advance()
        step = json.loads(watch.line())
        assert (step["event"], step["step"], step["step_s"]) == ("step", 4, 1.5)
        assert step["values"]["score_mean"] == 1.0
        run.control.end(RunState.FAILED, "no memory.")
        assert json.loads(watch.line())["state"] == "RUN_STATE_FAILED"
        assert json.loads(watch.line()) == {
            "event": "end",
            "state": "failed",
            "outcome": "failed after step 4 of 1000: no memory.",
        }
        assert watch.process.wait(WAIT_S) == 1


def test_a_trainer_that_comes_back_is_followed_on() -> None:
    """Killed after step 6, it goes on from the checkpoint of step 4."""
    port = free_port()
    with serving_run(LiveRun(step=6), port=port):
        watch = Watch(f"127.0.0.1:{port}", "--from_step=5")
        assert watch.until("step 6/1000")
    again = LiveRun(step=4)
    try:
        assert watch.until("does not answer, and is asked again")
        with serving_run(again, port=port):
            assert watch.until("the trainer answers again")
            assert watch.until("started again") == (
                "the trainer was started again, and goes on after step 4"
            )
            again.advance(2)
            assert watch.until("step 5/1000")
            assert watch.until("step 6/1000")
            again.end()
        assert watch.process.wait(WAIT_S) == 0
    finally:
        watch.process.kill()
        watch.process.communicate()


def test_a_trainer_that_stays_away_ends_the_watch() -> None:
    port = free_port()
    run = LiveRun()
    with serving_run(run, port=port):
        watch = Watch(f"127.0.0.1:{port}", "--wait_s=0")
        assert watch.until("a-run")
    watch.process.wait(WAIT_S)
    watch.process.communicate()
    assert watch.process.returncode == 3


class Terminal:
    """A ``kleash watch`` in a terminal of 100 columns; ``seen`` is what it has written."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            [*KLEASH, "watch", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color"},
        )
        os.close(theirs)
        self._seen = ""

    def press(self, key: str) -> None:
        os.write(self._ours, key.encode())

    def until(self, words: str) -> None:
        """Read until ``words``, and forget what came before."""
        end = time.monotonic() + WAIT_S
        while words not in self._seen:
            assert time.monotonic() < end, f"no {words!r} in {self._seen[-3000:]}"
            if not select.select([self._ours], [], [], 0.1)[0]:
                continue
            try:
                raw = os.read(self._ours, 1 << 16)
            except OSError:  # the other end is closed
                raw = b""
            assert raw, f"it has ended without {words!r}: {self._seen[-3000:]}"
            self._seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw.decode(errors="replace"))
        self._seen = self._seen[self._seen.index(words) + len(words) :]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    its = Terminal(*arguments)
    try:
        yield its
    finally:
        its.close()


def test_keys_steer_the_run(run: LiveRun) -> None:
    with serving_run(run) as server, terminal(server.address) as its:
        its.until("● running")
        its.until("step 3 of 1000")
        its.press("p")
        its.until("‖ paused")
        assert run.control.snapshot.state is RunState.PAUSED
        run.advance(3)
        its.until("step 4 of 1000")
        its.press("c")
        its.until("checkpoint of step 4 is on disk")
        its.press("r")
        its.until("step 6 of 1000")
        its.press("s")
        its.until("y / n")
        its.press("n")
        its.press("p")
        its.until("‖ paused")
        assert run.control.snapshot.state is RunState.PAUSED
        its.press("s")
        its.until("y / n")
        its.press("y")
        its.until("■ stopp")
        run.advance()
        its.until("kleash ppo --resume goes on")
        assert its.process.wait(WAIT_S) == 0


def test_leaving_leaves_the_run_alone(run: LiveRun) -> None:
    with serving_run(run) as server, terminal(server.address) as its:
        its.until("● running")
        its.press("q")
        assert its.process.wait(WAIT_S) == 0
        assert run.control.snapshot.state is RunState.RUNNING
        eventually(lambda: run.control._listeners == [])


def test_one_question_or_order(run: LiveRun) -> None:
    with serving_run(run) as server:

        def said(verb: str, *more: str) -> str:
            done = kleash("trainer", verb, server.address, *more)
            assert done.returncode == 0, done.stderr
            return done.stdout.rstrip("\n")

        assert said("status") == "a-run: running at step 3 of 1000"
        assert json.loads(said("status", "--json"))["last_step"]["values"]["score_mean"] == 0.75
        assert said("pause") == "paused after step 3 of 1000"
        run.advance(3)
        eventually(lambda: run.control.snapshot.step == 4)
        assert said("checkpoint") == "checkpoint of step 4: /runs/a/checkpoints/step-000004"
        assert "newest checkpoint: step 4" in said("status")
        assert said("resume").startswith("running at step ")
        assert said("stop").startswith("stopping after step ")


def test_refusals_are_sentences(run: LiveRun, tmp_path: Path) -> None:
    def refused(status: int, *arguments: str, **environment: str) -> str:
        done = kleash(*arguments, **environment)
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        *warnings, last = done.stderr.splitlines()
        assert last.startswith("error: ")
        assert all("travels in clear" in each for each in warnings)
        return last

    nobody = f"127.0.0.1:{free_port()}"
    assert f"cannot reach the service at {nobody}" in refused(3, "watch", nobody)
    noted = {"run_id": "other", "address": nobody, "page": ""}
    (tmp_path / "trainer.json").write_text(json.dumps(noted))
    told = refused(2, "watch", str(tmp_path))
    assert f"no trainer works in {tmp_path} now" in told
    token, line = make_token("someone")
    (tmp_path / "keys").write_text(line + "\n")
    auth = {"mode": "token", "tokens_file": tmp_path / "keys"}
    with serving_run(run, auth=auth) as server:
        told = refused(3, "watch", server.address)
        assert "KLEASH_TOKEN" in told
        told = refused(3, "trainer", "stop", server.address, KLEASH_TOKEN="wrong")
        assert "token" in told
        (tmp_path / "trainer.json").write_text(json.dumps({**noted, "address": server.address}))
        told = refused(3, "trainer", "status", str(tmp_path), KLEASH_TOKEN=token)
        assert "has the run a-run, and" in told
        assert "holds other, whose trainer is gone" in told
    with BackgroundServer([Doubler()]) as server:
        told = refused(3, "trainer", "status", server.address)
        print(told)
        assert server.address in told
    assert run.control.snapshot.state is RunState.RUNNING
