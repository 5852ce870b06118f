"""The trainer's HTTP port: events without gap or double, steering, the page's files, refusals."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.doubler import WAIT_S, eventually, free_port
from tests.services.http_client import HttpPort, Reply
from tests.services.live_run import LiveRun, figures_of, serving_run

from kleash.base import metrics
from kleash.ppo.control import RunState
from kleash.rpc import http_events
from kleash.rpc.static_tokens import make_token

pytestmark = pytest.mark.services

STEER = ("pause", "resume", "checkpoint", "stop")


@pytest.fixture
def run() -> Iterator[LiveRun]:
    run = LiveRun()
    yield run
    run.end()


@pytest.fixture
def port(run: LiveRun) -> Iterator[HttpPort]:
    number = free_port()
    with serving_run(run, http_port=number):
        yield HttpPort(number)
        run.end()


class Events:
    """An open stream, as a browser reads one."""

    def __init__(self, port: HttpPort, query: str = "", **headers: str) -> None:
        self._connection = port.connection()
        self._connection.request("GET", f"/v1/steps{query}", headers=headers)
        self.response = self._connection.getresponse()
        assert self.response.status == 200, self.response.read()

    def block(self) -> list[str]:
        """Lines up to the next empty one; none when the stream has ended."""
        lines: list[str] = []
        while line := self.response.readline().decode().rstrip("\n"):
            lines.append(line)
        return lines

    def next(self, name: str = "step") -> dict[str, str]:
        """The next event of that name."""
        while lines := self.block():
            found = dict(line.split(": ", 1) for line in lines if not line.startswith(":"))
            if found.get("event") == name:
                return found
        raise AssertionError(f"the stream has ended without {name}")

    def steps(self, count: int) -> list[int]:
        return [int(json.loads(self.next()["data"])["step"]) for _ in range(count)]

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def events(port: HttpPort, query: str = "", **headers: str) -> Iterator[Events]:
    with contextlib.closing(Events(port, query, **headers)) as stream:
        yield stream


def test_the_run_is_told_and_then_past_and_new_steps(run: LiveRun, port: HttpPort) -> None:
    with events(port, "?from=2") as stream:
        assert stream.response.headers["Content-Type"] == "text/event-stream"
        assert stream.response.headers["Cache-Control"] == "no-store"
        told = json.loads(stream.next("run")["data"])
        assert (told["run_id"], told["step"], told["state"]) == ("a-run", "3", "RUN_STATE_RUNNING")
        first = stream.next()
        assert first["id"] == "2"
        data = json.loads(first["data"])
        assert data["values"]["score_mean"] == 0.5
        run.advance(2)
        assert stream.steps(3) == [3, 4, 5]


def test_without_from_there_are_new_steps_only(run: LiveRun, port: HttpPort) -> None:
    with events(port) as stream:
        stream.next("run")
        run.advance()
        assert stream.steps(1) == [4]


def test_a_reader_that_comes_back_misses_nothing_and_gets_nothing_twice(
    run: LiveRun, port: HttpPort
) -> None:
    seen: list[int] = []
    for count in (3, 1, 4, 1):
        last = {"Last-Event-ID": str(seen[-1])} if seen else {}
        with events(port, "?from=1", **last) as stream:
            run.advance(2)  # while it reads, and after it has left
            seen += stream.steps(count)
    with events(port, "?from=1", **{"Last-Event-ID": str(seen[-1])}) as stream:
        run.advance()
        seen += stream.steps(12 - len(seen))
    assert seen == list(range(1, 13))


def test_changes_of_the_run_are_told_and_its_end_is(run: LiveRun, port: HttpPort) -> None:
    with events(port) as stream:
        stream.next("run")
        assert port.post("/v1/run:pause", {}).json["state"] == "RUN_STATE_PAUSED"
        assert json.loads(stream.next("run")["data"])["state"] == "RUN_STATE_PAUSED"
        run.advance(3)
        assert stream.steps(1) == [4]
        saved = port.post("/v1/run:checkpoint", {}).json
        assert saved == {"path": "/runs/a/checkpoints/step-000004", "step": "4"}
        assert json.loads(stream.next("run")["data"])["checkpoint_step"] == "4"
        assert run.step == 4
        assert port.post("/v1/run:resume", {}).json["state"] == "RUN_STATE_RUNNING"
        assert stream.steps(2) == [5, 6]
        assert port.post("/v1/run:stop", {}).json["state"] == "RUN_STATE_STOPPING"
        assert port.get("/v1/run").json["state"] == "RUN_STATE_STOPPING"
        run.advance(3)
        assert stream.next("end")["data"] == "{}"
        assert stream.block() == []
    assert run.control.snapshot.step == 7


def test_a_figure_that_is_not_finite_is_told(run: LiveRun, port: HttpPort) -> None:
    with events(port) as stream:
        stream.next("run")
        run.control.step_done(figures_of(4, policy_loss=float("nan"), ratio_max=float("inf")))
        values = json.loads(stream.next()["data"])["values"]
    assert (values["policy_loss"], values["ratio_max"]) == ("NaN", "Infinity")
    assert port.get("/v1/run").json["last_step"]["values"]["policy_loss"] == "NaN"


def test_samples_are_told_token_by_token(run: LiveRun, port: HttpPort) -> None:
    found = port.get("/v1/samples").json
    assert found["step"] == "3"
    (sample,) = found["samples"]
    assert sample["tokens"] == ["3 plus", " 4", " is 7"]
    assert sample["kl"] == [0.5, -0.25, 0.125]
    assert sample["rewards"] == [-0.025, 0.0125, 1.0]


def test_silence_is_filled_with_signs_of_life(
    port: HttpPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_events, "HEARTBEAT_S", 0.05)
    with events(port) as stream:
        stream.next("run")
        assert [stream.block(), stream.block()] == [[":"], [":"]]


def test_a_reader_that_takes_nothing_is_cut_off_and_holds_no_memory(
    run: LiveRun, port: HttpPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer goes on, other readers do, and what the slow one had open is given back."""
    monkeypatch.setattr(http_events, "SLOW_READER_S", 1.0)
    handled = metrics.GRPC_HANDLED.labels(
        "server_stream", "kleash.trainer.v1.TrainerService", "WatchSteps", "CANCELLED"
    )
    before = handled._value.get()
    written: list[int] = []
    encoded = http_events._encoded

    def counting(event: Any) -> bytes:
        block = encoded(event)
        written.append(len(block))
        return block

    monkeypatch.setattr(http_events, "_encoded", counting)
    heavy = {f"figure_{number}": float(number) for number in range(5000)}
    with socket.create_connection(("127.0.0.1", port.port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"GET /v1/steps HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert slow.recv(64).startswith(b"HTTP/1.1 200")
        for step in range(4, 404):
            run.control.step_done(figures_of(step, **heavy))
        eventually(lambda: handled._value.get() == before + 1)
        # What was made for it fits into the buffers of two sockets; the steps are 50 MB.
        assert sum(written) < 16_000_000
        assert len(written) < 200
    with events(port, "?from=403") as stream:
        assert stream.steps(1) == [403]
    eventually(lambda: run.control._listeners == [])


def test_readers_that_leave_are_forgotten(run: LiveRun, port: HttpPort) -> None:
    for _ in range(3):
        with events(port) as stream:
            stream.next("run")
            assert len(run.control._listeners) == 1
        eventually(lambda: run.control._listeners == [])


def test_the_page_is_given_with_a_policy_and_asks_nobody_else(port: HttpPort) -> None:
    page = port.get("/")
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    loaded = {"/page.css", "/page.js", "/charts.js", "/format.js", "/samples.js", "/stream.js"}
    for path in loaded:
        file = port.get(path)
        assert file.status == 200, path
        assert b"http://" not in file.body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in file.body
    assert b"<script>" not in page.body
    assert b"style=" not in page.body


@pytest.mark.parametrize(
    ("query", "headers", "told"),
    [
        ("?from=x", {}, "from is 'x'; it must be the number of a step."),
        ("?from=-1", {}, "from is '-1'"),
        ("?from=" + "9" * 30, {}, "it must be the number of a step"),
        ("?since=1", {}, "the address has 'since' in its query; there is from."),
        ("", {"Last-Event-ID": "seven"}, "Last-Event-ID is 'seven'"),
    ],
)
def test_what_cannot_be_asked(
    port: HttpPort, query: str, headers: dict[str, str], told: str
) -> None:
    reply = port.get(f"/v1/steps{query}", headers)
    assert reply.status == 400
    assert told in reply.error["message"]


def test_a_form_of_another_site_steers_nothing(run: LiveRun, port: HttpPort) -> None:
    """A page elsewhere may post plain text and forms without asking; never JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; b=1"):
        reply = port.ask("POST", "/v1/run:stop", b"{}", {"Content-Type": kind})
        assert reply.status == 415, kind
    reply = port.ask("OPTIONS", "/v1/run:stop", headers={"Origin": "http://a.example"})
    assert "access-control-allow-origin" not in reply.headers
    assert port.get("/v1/run:stop").status == 405
    assert run.control.snapshot.state is RunState.RUNNING


@pytest.fixture
def guarded(run: LiveRun, tmp_path: Path) -> Iterator[tuple[HttpPort, dict[str, str]]]:
    token, line = make_token("someone")
    (tmp_path / "keys").write_text(line + "\n")
    number = free_port()
    auth = {"mode": "token", "tokens_file": tmp_path / "keys"}
    with serving_run(run, http_port=number, auth=auth):
        yield HttpPort(number), {"Authorization": f"Bearer {token}"}
        run.end()


def test_without_the_token_there_is_the_empty_page_and_nothing_else(
    run: LiveRun, guarded: tuple[HttpPort, dict[str, str]]
) -> None:
    port, right = guarded

    def ask_all(headers: dict[str, str]) -> list[Reply]:
        replies = [port.get(f"/v1/{path}", headers) for path in ("run", "samples", "steps?from=x")]
        return replies + [port.post(f"/v1/run:{verb}", {}, headers) for verb in STEER]

    for headers in ({}, {"Authorization": "Bearer wrong"}):
        assert {reply.status for reply in ask_all(headers)} == {401}
    assert run.control.snapshot.state is RunState.RUNNING
    page = port.get("/")
    assert page.status == 200
    assert b"a-run" not in page.body
    assert port.post("/v1/run:pause", {}, right).json["state"] == "RUN_STATE_PAUSED"
    with events(port, "?from=3", **right) as stream:
        assert stream.steps(1) == [3]


def test_a_head_of_the_events_is_answered(port: HttpPort) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port.port, timeout=WAIT_S)
    connection.request("HEAD", "/v1/steps")
    assert connection.getresponse().status == 200
    connection.close()
