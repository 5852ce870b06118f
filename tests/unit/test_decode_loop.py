"""The decoding thread when things go wrong: nobody waits for a thread that is dead or hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kleash.lm.decode import Decoded, Decoder, DecodeRequest
from kleash.lm.load import load_causal_lm
from kleash.policy.config import PolicyConfig
from kleash.policy.decode_loop import DecodeLoop
from kleash.policy.service import PolicyService
from kleash.rpc.errors import Unavailable

pytestmark = pytest.mark.unit

WAIT_S = 10.0


def request_of(prompt_id: str) -> DecodeRequest:
    return DecodeRequest(np.array([7], np.int32), prompt_id, 0, seed=0, max_new_tokens=4)


class Caller:
    """Collects what is delivered to one request."""

    def __init__(self) -> None:
        self.event: list[Decoded] | Exception | None = None
        self.is_told = threading.Event()

    def __call__(self, event: list[Decoded] | Exception) -> None:
        self.event = event
        self.is_told.set()


def test_a_thread_that_dies_answers_those_who_wait(tiny_folder: Path) -> None:
    """A step fails, and so does the new decoder; meanwhile a request and a publish arrive."""
    model = load_causal_lm(tiny_folder)
    is_renewing, may_fail = threading.Event(), threading.Event()
    decoders: list[Decoder] = []

    def make_decoder() -> Decoder:
        if decoders:
            is_renewing.set()
            assert may_fail.wait(WAIT_S)
            raise RuntimeError("out of memory again.")
        decoders.append(Decoder(model, max_slots=2, max_length=16))
        return decoders[0]

    def fail() -> list[Decoded]:
        raise RuntimeError("out of memory.")

    loop = DecodeLoop(make_decoder, max_queued_tokens=100, model_name="tiny")
    decoders[0].step = fail  # pyright: ignore[reportAttributeAccessIssue]
    running, waiting = Caller(), Caller()
    loop.start()
    loop.submit([request_of("running")], running)
    assert is_renewing.wait(WAIT_S)
    assert str(running.event) == "out of memory."
    loop.submit([request_of("waiting")], waiting)
    command = loop.run(lambda: "done between two steps")
    may_fail.set()
    assert waiting.is_told.wait(WAIT_S)
    assert isinstance(waiting.event, Unavailable)
    assert waiting.event.reason == "DEAD"
    assert command.result(WAIT_S) == "done between two steps"
    assert not loop.is_running
    with pytest.raises(Unavailable, match="has died"):
        loop.submit([request_of("late")], Caller())
    with pytest.raises(Unavailable, match="has died"):
        loop.run(lambda: None)
    loop.stop()


def test_a_model_that_hangs_does_not_keep_the_process_alive(tiny_folder: Path) -> None:
    service = PolicyService(PolicyConfig(model=tiny_folder))
    service.load()
    loop = service.engine.loop
    has_entered, may_go_on = threading.Event(), threading.Event()
    step = loop.decoder.step

    def hang() -> list[Decoded]:
        has_entered.set()
        may_go_on.wait(WAIT_S)
        return step()

    loop.decoder.step = hang  # pyright: ignore[reportAttributeAccessIssue]
    caller = Caller()
    loop.submit([request_of("hangs")], caller)
    assert has_entered.wait(WAIT_S)

    async def stop() -> None:
        await service.start()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(service.stop(), timeout=0.1)

    began = time.monotonic()
    asyncio.run(stop())
    assert time.monotonic() - began < WAIT_S / 2
    assert loop.is_alive
    may_go_on.set()
    asyncio.run(service.stop())
    assert not loop.is_alive
    assert isinstance(caller.event, list)
