"""What runs on a server's event loop, and what it is spared."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import kleash.base.logging
import kleash.rpc.server
from kleash.cli import serve
from kleash.rpc.batcher import Batcher
from kleash.rpc.deadline import deadline, set_remaining_s
from kleash.rpc.work import TINY_BYTES, Work, answer

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("num_bytes", "is_handed_over"), [(TINY_BYTES, False), (TINY_BYTES + 1, True)]
)
def test_tiny_requests_are_answered_on_the_loop_and_others_off_it(
    num_bytes: int, is_handed_over: bool
) -> None:
    seen: dict[str, tuple[bool, bool]] = {}

    def note(what: str) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        seen[what] = (is_main, deadline() is not None)

    def begin() -> Work[int, int, list[int]]:
        note("begin")
        return Work([1, 2], [3, 3], False, finish)

    def finish(results: list[int], usage: Any) -> list[int]:
        note("finish")
        assert usage.tokens == 6
        return results

    async def run() -> list[int]:
        batcher: Batcher[int, int] = Batcher(
            lambda items: [10 * item for item in items],
            size=lambda item: 3,
            max_batch_tokens=100,
            max_queued_tokens=100,
            service="test",
        )
        await batcher.start()
        set_remaining_s(60)
        with ThreadPoolExecutor(1) as threads:
            answered = await answer(
                begin, batcher, threads, service="test", model_name="m", num_bytes=num_bytes
            )
        await batcher.stop()
        return answered

    assert asyncio.run(run()) == [10, 20]
    assert seen["begin"] == (not is_handed_over, True)
    assert seen["finish"][0] is not is_handed_over


def test_the_garbage_collector_is_spared_what_a_server_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = gc.get_freeze_count()

    async def host(services: Any, config: Any, *, on_ready: Any) -> None:
        on_ready(1)

    monkeypatch.setattr(kleash.rpc.server, "serve", host)
    monkeypatch.setattr(kleash.base.logging, "configure_logging", lambda: None)
    try:
        assert serve.run(["reward", f"--model={tmp_path}"]) == 0
        assert gc.get_freeze_count() > before + 10_000
    finally:
        gc.unfreeze()
