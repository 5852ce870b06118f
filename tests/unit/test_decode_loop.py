"""The decoding thread when things go wrong: nobody waits for a thread that is dead or hangs."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kleash.base import metrics
from kleash.lm.decode import Decoded, Decoder, DecodeRequest
from kleash.lm.load import load_causal_lm
from kleash.policy.commits import Committed
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


def test_an_idle_loop_shows_that_nothing_runs(tiny_folder: Path) -> None:
    """It shows its queue before it waits, or the last call would run for ever in the metrics."""
    model = load_causal_lm(tiny_folder)
    loop = DecodeLoop(
        lambda: Decoder(model, max_slots=2, max_length=16), max_queued_tokens=100, model_name="idle"
    )
    running = metrics.RUNNING_REQUESTS.labels("policy", "idle")
    seen: list[float] = []
    caller = Caller()
    loop.start()
    step = loop.decoder.step

    def watched() -> list[Decoded]:
        seen.append(running._value.get())
        return step()

    loop.decoder.step = watched  # pyright: ignore[reportAttributeAccessIssue]
    loop.submit([request_of("only")], caller)
    assert caller.is_told.wait(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while running._value.get() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running._value.get() == 0
    assert 1 in seen
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


def loop_with(model: Any, actions: dict[int, Callable[[DecodeLoop], object]]) -> DecodeLoop:
    """A loop with one decoder, which does ``actions[n]`` in its step n, the first being 1."""
    decoders = [Decoder(model, max_slots=2, max_length=16)]
    loop = DecodeLoop(decoders.pop, max_queued_tokens=100, model_name="tiny")
    step, numbers = loop.decoder.step, itertools.count(1)

    def act() -> list[Decoded]:
        if action := actions.get(next(numbers)):
            action(loop)
        return step()

    loop.decoder.step = act
    return loop


def fail(_: object = None) -> None:
    raise RuntimeError("out of memory.")


def test_a_thread_that_dies_answers_a_commit_that_waits(tiny_folder: Path) -> None:
    futures: list[Future[Committed[None]]] = []
    loop = loop_with(
        load_causal_lm(tiny_folder),
        {2: lambda loop: futures.append(loop.commit(lambda: None, "drain")), 3: fail},
    )
    caller = Caller()
    loop.submit([request_of("running")], caller)
    loop.start()
    assert caller.is_told.wait(WAIT_S)
    loop._thread.join(WAIT_S)
    with pytest.raises(Unavailable, match="has died"):
        futures[0].result(0)
    with pytest.raises(Unavailable, match="has died"):
        loop.commit(lambda: None, "keep")


def test_rows_that_cannot_be_computed_again_are_given_up_and_the_commit_stands(
    tiny_folder: Path,
) -> None:
    model = load_causal_lm(tiny_folder)
    futures: list[Future[Committed[str]]] = []
    loop = DecodeLoop(
        lambda: Decoder(model, max_slots=2, max_length=16), max_queued_tokens=100, model_name="tiny"
    )

    def publish() -> str:
        loop.decoder.weights_version = 1
        loop.decoder.refill_cache = fail
        return "done"

    step = loop.decoder.step

    def commit() -> list[Decoded]:
        if not futures:
            futures.append(loop.commit(publish, "reprefill"))
        return step()

    loop.decoder.step = commit
    running, later = Caller(), Caller()
    loop.submit([request_of("running")], running)
    loop.start()
    assert running.is_told.wait(WAIT_S)
    assert str(running.event) == "out of memory."
    assert futures[0].result(WAIT_S).result == "done"
    loop.submit([request_of("later")], later)
    assert later.is_told.wait(WAIT_S)
    loop.stop()
    assert isinstance(later.event, list)
    assert later.event[0].versions == [(0, 4, 1)]


def test_weights_that_may_not_generate_refuse_everything(tiny_folder: Path) -> None:
    refusal = Unavailable("the replica is quarantined.", reason="QUARANTINED")

    def break_weights(loop: DecodeLoop) -> None:
        loop.refuse(lambda: refusal)
        raise ValueError("the digest differs.")

    futures: list[Future[Committed[None]]] = []
    loop = loop_with(
        load_causal_lm(tiny_folder),
        {2: lambda loop: futures.append(loop.commit(lambda: break_weights(loop), "keep"))},
    )
    running, waiting, later = Caller(), Caller(), Caller()
    loop.submit([request_of("running"), request_of("another")], running)
    loop.submit([request_of("waiting")], waiting)
    loop.start()
    assert running.is_told.wait(WAIT_S)
    assert waiting.is_told.wait(WAIT_S)
    assert running.event is waiting.event is refusal
    with pytest.raises(ValueError, match="the digest differs"):
        futures[0].result(WAIT_S)
    with pytest.raises(Unavailable, match="is quarantined"):
        loop.submit([request_of("refused")], Caller())
    loop.refuse(None)
    loop.submit([request_of("later")], later)
    assert later.is_told.wait(WAIT_S)
    loop.stop()
    assert isinstance(later.event, list)
