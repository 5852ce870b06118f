"""``kleash score`` against a server: results in order, statuses, resuming, signals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.services.scripted_reward import ScriptedReward, serving
from tests.services.signals import hears_ctrl_c

from kleash.cli import score
from kleash.cli.main import main
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def service() -> ScriptedReward:
    return ScriptedReward(max_items=64, max_message_bytes=100_000)


@pytest.fixture(autouse=True)
def address(service: ScriptedReward, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("KLEASH_REWARD_MODEL", raising=False)
    monkeypatch.delenv("KLEASH_REWARD_TIMEOUT_S", raising=False)
    with serving(service) as server:
        monkeypatch.setenv("KLEASH_REWARD_ADDRESS", server.address)
        yield server.address


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines_file(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_texts_of_the_command_line(capsys: Capture) -> None:
    assert main(["score", "--text=abc", "--text", "de", "--model=honest"]) == 0
    printed = capsys.readouterr()
    records = [json.loads(line) for line in printed.out.splitlines()]
    assert [(r["line"], r["code"], r["score"]) for r in records] == [(1, "OK", 3), (2, "OK", 2)]
    assert records[0]["components"] == {"long": 3, "half": 1.5}
    assert (records[0]["uncertainty"], records[0]["token_count"]) == (0.25, 3)
    assert {(r["model"], r["revision"]) for r in records} == {("honest", "sha256:1")}
    assert printed.err == "2 scored\n"


def test_order_is_kept_over_many_blocks(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, service: ScriptedReward
) -> None:
    """Blocks of 5 lines, 3 at a time; blank lines have no result."""
    monkeypatch.setattr(score, "BLOCK_ITEMS", 5)
    texts = ["x" * (n % 7 + 1) if n % 10 else "" for n in range(100)]
    source = lines_file(tmp_path / "in.txt", texts)
    assert main(["score", str(source), f"--out={out}", "--parallel=3"]) == 0
    assert [(r["line"], r["score"]) for r in written(out)] == [
        (n + 1, len(text)) for n, text in enumerate(texts) if text
    ]
    assert 1 < service.max_running <= 3


def test_every_kind_of_line(tmp_path: Path, out: Path) -> None:
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    rows: list[Any] = [
        {"id": "a", "text": "abcd"},
        {"id": 2, "prompt": "q", "responses": ["a", "bbb", "cc"]},
        {"messages": turns},
        {"prompt": "q", "response": "rr"},
        {"text": "bad one"},
    ]
    source = lines_file(tmp_path / "in.jsonl", [json.dumps(row) for row in rows])
    assert main(["score", str(source), f"--out={out}"]) == 1
    single, ranked, turned, answered, bad = written(out)
    assert (single["id"], single["score"]) == ("a", 4)
    assert (ranked["id"], ranked["ranking"], ranked["code"]) == (2, [1, 2, 0], "OK")
    assert [each["score"] for each in ranked["scores"]] == [1, 3, 2]
    assert ranked["preference"] == [0.5] * 3
    assert (turned["score"], answered["score"]) == (3, 3)
    assert (bad["code"], bad["error"], bad["line"]) == ("INVALID_INPUT", "it is bad.", 5)
    assert "score" not in bad


def test_options_reach_the_service(service: ScriptedReward) -> None:
    assert main(["score", "--text=a", "--normalize=false", "--truncation=left"]) == 0
    [request] = service.asked(reward_pb2.ScoreRequest)
    assert not request.options.normalize
    assert request.options.truncation == reward_pb2.TRUNCATION_LEFT
    assert request.revision == "sha256:1"
    assert main(["score", "--text=a"]) == 0
    assert service.asked(reward_pb2.ScoreRequest)[-1].options.normalize


def test_a_ranking_that_is_too_large_fails_alone(tmp_path: Path, out: Path) -> None:
    rows = [{"prompt": "q", "responses": ["a", "b" * 100_000]}, {"text": "abc"}]
    source = lines_file(tmp_path / "in.jsonl", [json.dumps(row) for row in rows])
    assert main(["score", str(source), f"--out={out}"]) == 1
    large, small = written(out)
    assert large["code"] == "INVALID_INPUT"
    assert "the comparison has" in large["error"]
    assert (small["score"], large["revision"]) == (3, small["revision"])


def test_a_bad_line_ends_it_after_the_lines_before(
    tmp_path: Path, out: Path, capsys: Capture
) -> None:
    source = lines_file(tmp_path / "in.jsonl", ['{"text": "a"}', '{"text": 5}', '{"text": "c"}'])
    assert main(["score", str(source), f"--out={out}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {source}:2: field 'text': must be text, not a number."
    assert [r["line"] for r in written(out)] == [1]


def test_bad_lines_are_left_out_and_counted(tmp_path: Path, out: Path, capsys: Capture) -> None:
    source = lines_file(tmp_path / "in.jsonl", ['{"text": "a"}', "{", "5", '{"text": "c"}'])
    assert main(["score", str(source), f"--out={out}", "--skip-bad"]) == 0
    assert [r["line"] for r in written(out)] == [1, 4]
    counts, first = capsys.readouterr().err.splitlines()
    assert counts == "2 scored, 2 bad lines left out"
    assert first.startswith(f"first line left out: {source}:2: is not valid JSON")
    assert main(["score", str(source), f"--out={out}", "--skip-bad", "--resume"]) == 0
    assert len(written(out)) == 2


def test_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    class Input:
        buffer = io.BytesIO(b'{"text": "abc"}\n{"text": "de"}\n')

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdin", Input())
    assert main(["score", "--format=jsonl", "-"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["score"] for r in records] == [3, 2]
    monkeypatch.setattr(Input, "isatty", lambda _: True)
    assert main(["score"]) == 2
    assert "there is nothing to score" in capsys.readouterr().err


def test_an_existing_file_is_left_alone(tmp_path: Path, out: Path, capsys: Capture) -> None:
    out.write_text("mine")
    source = lines_file(tmp_path / "in.txt", ["a"])
    assert main(["score", str(source), f"--out={out}"]) == 2
    assert "exists already; --resume goes on with it" in capsys.readouterr().err
    out.write_text("mine\nall of it")
    assert main(["score", str(source), f"--out={out}", "--resume"]) == 2
    assert f"{out}:1 was not written by kleash score" in capsys.readouterr().err
    assert out.read_text() == "mine\nall of it"


@pytest.fixture
def interrupted(tmp_path: Path, out: Path) -> Path:
    """An input of 30 lines, of which ``out`` holds 12 and a torn one."""
    source = lines_file(tmp_path / "in.txt", ["x" * (n + 1) for n in range(30)])
    assert main(["score", str(source), f"--out={out}"]) == 0
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:12]) + lines[12][:40])
    return source


def test_resume_goes_on_behind_the_last_whole_line(
    interrupted: Path, out: Path, service: ScriptedReward, capsys: Capture
) -> None:
    service.requests.clear()
    capsys.readouterr()
    assert main(["score", str(interrupted), f"--out={out}", "--resume"]) == 0
    assert [(r["line"], r["score"]) for r in written(out)] == [(n, n) for n in range(1, 31)]
    assert sum(len(each.items) for each in service.asked(reward_pb2.ScoreRequest)) == 18
    assert capsys.readouterr().err == "30 scored, 12 by an earlier run\n"


@pytest.mark.parametrize("left", ["", "{torn"])
def test_resume_begins_where_nothing_was_written(interrupted: Path, out: Path, left: str) -> None:
    out.write_text(left)
    assert main(["score", str(interrupted), f"--out={out}", "--resume"]) == 0
    assert len(written(out)) == 30
    out.unlink()
    assert main(["score", str(interrupted), f"--out={out}", "--resume"]) == 0
    assert len(written(out)) == 30


def test_resume_counts_failures_of_before(
    tmp_path: Path, out: Path, service: ScriptedReward
) -> None:
    source = lines_file(tmp_path / "in.txt", ["bad", "good"])
    assert main(["score", str(source), f"--out={out}"]) == 1
    assert main(["score", str(source), f"--out={out}", "--resume"]) == 1


def test_resume_refuses_another_input_options_or_model(
    interrupted: Path, out: Path, service: ScriptedReward, capsys: Capture
) -> None:
    before = out.read_bytes()
    good = interrupted.read_text()

    def refusal(*more: str) -> str:
        assert main(["score", str(interrupted), f"--out={out}", "--resume", *more]) == 2
        assert out.read_bytes() == before
        return capsys.readouterr().err

    changed = f"error: {out}:3 is the result of another line than {interrupted}:"
    interrupted.write_text(good.replace("xxx\n", "xyx\n", 1))
    assert f"{changed}3" in refusal()
    interrupted.write_text(good.replace("xxx\n", "xxx\n\n", 1).replace("\nxx\n", "\n\nxx\n"))
    assert f"{out}:2 is the result of another line than {interrupted}:3" in refusal()
    interrupted.write_text("x\nxx\n")
    assert f"{out}:3 has a result, and the input ends before" in refusal()
    interrupted.write_text(good)
    assert f"{out}:1 is the result of another line" in refusal("--normalize=false")
    assert "was begun with the model 'kind', revision sha256:1" in refusal("--model=honest")
    service.revision = "sha256:2"
    assert "that is not served now" in refusal()


def test_a_file_of_two_revisions_is_refused(interrupted: Path, out: Path, capsys: Capture) -> None:
    lines = out.read_text().splitlines(keepends=True)[:12]
    lines[5] = lines[5].replace("sha256:1", "sha256:9")
    out.write_text("".join(lines))
    assert main(["score", str(interrupted), f"--out={out}", "--resume"]) == 2
    assert "begin a new file" in capsys.readouterr().err


def test_a_service_that_fails_is_status_3_and_resumable(
    interrupted: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out.unlink()
    with monkeypatch.context() as patch:
        patch.setenv("KLEASH_REWARD_ADDRESS", "127.0.0.1:1")
        assert main(["score", str(interrupted), f"--out={out}", "--timeout_s=5"]) == 3
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert not out.exists()
    assert main(["score", str(interrupted), f"--out={out}", "--resume"]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_file_to_go_on_with(
    tmp_path: Path, out: Path, service: ScriptedReward, number: signal.Signals
) -> None:
    """In the middle of a call that would not end."""
    source = lines_file(tmp_path / "in.txt", ["x"] * 3000)
    command = [sys.executable, "-m", "kleash.cli", "score", str(source), f"--out={out}"]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,  # noqa: PLW1509 (one system call, no locks)
    ) as process:
        deadline = time.monotonic() + 60
        while not (out.exists() and out.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        service.gate.clear()
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
    service.gate.set()
    assert process.returncode == 128 + number
    assert "Traceback" not in error
    assert out.read_bytes().endswith(b"}\n")
    assert 0 < len(written(out)) < 3000
    assert main(["score", str(source), f"--out={out}", "--resume"]) == 0
    assert [r["line"] for r in written(out)] == list(range(1, 3001))


def test_a_reader_that_has_left_is_no_error(tmp_path: Path) -> None:
    source = lines_file(tmp_path / "in.txt", ["x"] * 3000)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kleash.cli", "score", str(source)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


LIGHT = """
import sys
HEAVY = ("torch", "transformers", "pydantic", "prometheus_client", "rich", "datasets")
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Missing())
from kleash.cli.main import main
assert main(["score", "--help"]) == 0
sys.exit(main(["score", "--text=abc"]))
"""


def test_it_needs_the_base_install_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["score"] == 3


def test_scores_are_those_of_a_real_model(
    tiny_reward_folder: Path, tmp_path: Path, out: Path
) -> None:
    """Written with the digits of a float32: reading them back gives the same number."""
    import numpy as np

    from kleash.client import RewardClient

    texts = [f"the quick brown fox {n}" for n in range(40)]
    source = lines_file(tmp_path / "in.txt", texts)
    model = RewardService(RewardConfig(model=tiny_reward_folder))
    with (
        BackgroundServer([model], ServerConfig()) as server,
        RewardClient(server.address) as client,
    ):
        assert main(["score", str(source), f"--out={out}", f"--address={server.address}"]) == 0
        expected = [score.score for score in client.score_texts(texts)]
    assert [np.float32(r["score"]) for r in written(out)] == pytest.approx(expected, abs=1e-5)
    assert {len(repr(r["score"]).lstrip("-")) for r in written(out)} <= set(range(3, 14))
