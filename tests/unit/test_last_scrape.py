"""A process that fails stays until its metrics were read, and no longer than it may."""

from __future__ import annotations

import threading
import time
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from kleash.base.metrics import TRAIN_NONFINITE
from kleash.base.progress import NullProgress
from kleash.ppo import run as ppo_run
from kleash.ppo.config import PPOConfig
from kleash.ppo.learner import TrainingDivergedError
from kleash.rpc import last_scrape
from kleash.rpc.last_scrape import wait_for_scrape
from kleash.rpc.ports import serve_metrics
from kleash.up.supervisor import free_port

pytestmark = pytest.mark.unit

WAIT_S = 30.0


def read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as answer:
        return answer.read().decode()


def test_it_ends_with_the_next_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_scrape, "ANSWER_S", 0.0)
    port = free_port()
    end = serve_metrics("127.0.0.1", port)
    assert end is not None
    read(port)  # one before it waits does not count
    answers: list[bool] = []
    waiting = threading.Thread(
        target=lambda: answers.append(wait_for_scrape(WAIT_S, lambda: False))
    )
    waiting.start()
    time.sleep(2 * last_scrape.POLL_S)
    assert not answers
    read(port)
    waiting.join(WAIT_S)
    end()
    assert answers == [True]


def test_it_ends_without_one_when_nobody_has_the_time() -> None:
    assert not wait_for_scrape(0.0, lambda: False)
    assert not wait_for_scrape(WAIT_S, lambda: True)
    assert not [each for each in last_scrape.REGISTRY._collector_to_names if is_waiting(each)]


def is_waiting(collector: object) -> bool:
    return isinstance(collector, last_scrape._Scrape)


def test_a_run_that_diverged_is_there_until_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter is that of a process which ends: nobody would see it rise."""
    port = free_port()
    config = PPOConfig.model_validate(
        {
            "out": tmp_path / "run",
            "prompts": "unused.jsonl",
            "model": tmp_path,
            "reward_model": tmp_path,
            "server": {"metrics_port": port},
        }
    )
    has_diverged = threading.Event()

    def diverge(*_: object, **__: object) -> None:
        TRAIN_NONFINITE.inc()
        has_diverged.set()
        raise TrainingDivergedError("the gradient of the policy is not finite.")

    monkeypatch.setattr(ppo_run, "train", diverge)
    no_services: Any = nullcontext()
    before = TRAIN_NONFINITE._value.get()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            ppo_run.run(config, NullProgress(), open_services=lambda *_: no_services)
        except TrainingDivergedError as error:
            failures.append(error)

    running = threading.Thread(target=run)
    running.start()
    assert has_diverged.wait(WAIT_S)
    running.join(3 * last_scrape.POLL_S)
    assert running.is_alive()
    assert f"kleash_train_nonfinite_total {before + 1}" in read(port)
    running.join(WAIT_S)
    assert [str(error) for error in failures] == ["the gradient of the policy is not finite."]
