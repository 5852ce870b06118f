"""The process of a Python function as a reward model: its limits, its death, what it prints."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.reward_functions import Load, loading, scores, wait_for

from kleash.reward.function import FunctionModel
from kleash.reward.local import LocalReward
from kleash.reward.v1 import reward_pb2

pytestmark = pytest.mark.unit


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    with loading(tmp_path) as load:
        yield load


def process_of(local: LocalReward) -> Any:
    assert isinstance(local.model, FunctionModel)
    return local.model._process._child


def test_one_that_takes_too_long_is_killed_and_started_anew(load: Load) -> None:
    local = load(
        """
        import time
        def score(items):
            if any(item["text"] == "hang" for item in items):
                time.sleep(600)
            return [1.0] * len(items)
        """,
        function_timeout_s=0.5,
    )
    before = process_of(local)
    began = time.monotonic()
    got = local.score_texts(["a", "hang"], raise_on_item_error=False)
    assert time.monotonic() - began < 60
    assert {each.code for each in got} == {"FAILED"}
    assert "took longer than 0.5 s for 2 items and was stopped" in got[0].error_message
    assert "function_timeout_s" in got[0].error_message
    assert before.poll() == -signal.SIGKILL
    assert scores(local, "a", "b") == [1.0, 1.0]
    assert process_of(local).pid != before.pid


def test_one_that_ended_between_two_calls_fails_no_item(load: Load) -> None:
    local = load("def score(items): return [1.0] * len(items)")
    os.killpg(process_of(local).pid, signal.SIGKILL)
    os.waitid(os.P_PID, process_of(local).pid, os.WEXITED | os.WNOWAIT)
    assert scores(local, "a") == [1.0]


def test_what_a_killed_function_started_is_killed_with_it(load: Load, tmp_path: Path) -> None:
    local = load(
        f"""
        import subprocess, time
        def score(items):
            child = subprocess.Popen(["sleep", "600"])
            open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
            time.sleep(600)
        """,
        function_timeout_s=1.0,
    )
    local.score_texts(["a"], raise_on_item_error=False)
    wait_for(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_one_that_ends_its_process_fails_the_items_that_did_it(load: Load) -> None:
    local = load(
        """
        import os
        def score(items):
            for item in items:
                if item["text"] == "die": os.abort()
                if item["text"] == "exit": os._exit(3)
            return [2.0] * len(items)
        """
    )
    got = local.score_texts(["a", "die", "b", "exit"], raise_on_item_error=False)
    assert [each.code for each in got] == ["OK", "FAILED", "OK", "FAILED"]
    assert got[1].error_message == "the function's process was ended by SIGABRT."
    assert got[3].error_message == "the function's process ended with exit status 3."


def test_its_death_is_seen_though_a_process_of_its_own_lives_on(load: Load, tmp_path: Path) -> None:
    local = load(
        f"""
        import os, time
        def score(items):
            if os.fork() == 0:
                open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
                time.sleep(600)
            os._exit(4)
        """
    )
    [got] = local.score_texts(["a"], raise_on_item_error=False)
    assert got.error_message == "the function's process ended with exit status 4."
    wait_for(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_what_it_prints_goes_to_the_log_and_nowhere_else(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        local = load(
            """
            import os, sys
            print("at import")
            def score(items):
                print("out")
                print("err", file=sys.stderr)
                os.write(1, b"raw \\xff" + b"x" * 5000 + b"\\n")
                return [1.0] * len(items)
            """
        )
        assert scores(local, "a") == [1.0]
        wait_for(lambda: "raw" in caplog.text)
    assert scores(local, "b") == [1.0]
    for words in ("at import", "out", "err", "raw \N{REPLACEMENT CHARACTER}xxx"):
        assert f"function of 'score': {words}" in caplog.text


def test_a_changed_file_is_not_served_under_the_old_revision(load: Load, tmp_path: Path) -> None:
    """After the process ended the new one would compute something else."""
    local = load("def score(items): return [1.0] * len(items)")
    (tmp_path / "judge.py").write_text("def score(items): return [2.0] * len(items)\n")
    assert scores(local, "a") == [1.0]
    os.killpg(process_of(local).pid, signal.SIGKILL)
    os.waitid(os.P_PID, process_of(local).pid, os.WEXITED | os.WNOWAIT)
    got = local.score_texts(["a"], raise_on_item_error=False)
    assert got[0].code == "FAILED"
    assert "has changed since this model was loaded; load it again" in got[0].error_message


def test_one_call_at_a_time_from_any_thread(load: Load) -> None:
    """A model of its own and a member of an ensemble are asked from two threads."""
    local = load(
        """
        import time
        def score(items):
            time.sleep(0.01)
            return [float(item["text"]) for item in items]
        """
    )
    model, results = local.model, {}
    options = reward_pb2.ScoreOptions()

    def ask(number: int) -> None:
        items = [reward_pb2.ScoreItem(text=str(number))]
        [job] = model.prepare(items, options, "items[{}]")
        results[number] = [model.compute([job])[0].score for _ in range(5)]  # type: ignore[list-item]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [float(number)] * 5 for number in range(4)}


def test_items_larger_than_a_socket_holds(load: Load) -> None:
    local = load(
        "def score(items): return [len(item['text']) for item in items]",
        limits={"max_item_tokens": 2_000_000, "max_batch_tokens": 4_000_000}
        | {"max_queued_tokens": 4_000_000},
    )
    assert scores(local, "a" * 5_000_000, "\u00e9\n\u2028" * 3) == [5e6, 9.0]


def test_it_ends_when_the_service_is_killed_in_the_middle_of_a_call(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "import os, time\n"
        "def score(items):\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} ')\n"
        "    time.sleep(600)\n"
    )
    code = (
        "from kleash.reward.function_process import FunctionProcess\n"
        f"process = FunctionProcess('judge:score', [{str(tmp_path)!r}], name='judge')\n"
        "process.call([{}], 600)\n"
    )
    service = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: (tmp_path / "pid").exists() and " " in (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    assert not is_gone(child)
    service.kill()
    service.wait()
    wait_for(lambda: is_gone(child))


def test_it_ends_with_the_service(load: Load) -> None:
    local = load("def score(items): return [1.0] * len(items)")
    child = process_of(local)
    local.close()
    assert child.poll() is not None


def test_it_knows_nothing_of_torch_and_of_grpc(load: Load) -> None:
    local = load(
        """
        import sys
        def score(items):
            return [float("torch" in sys.modules or "grpc" in sys.modules)] * len(items)
        """
    )
    assert scores(local, "a") == [0.0]


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"
