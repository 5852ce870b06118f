"""Generation across a commit of new weights: what becomes of rows, tokens, log-probs and spans."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kleash.lm.decode import Decoded, Decoder, DecodeRequest
from kleash.lm.generate import generate
from kleash.lm.load import load_causal_lm
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sequences import TokenSequence, pack
from kleash.lm.tiny import Kind
from kleash.policy.commits import InFlight
from kleash.policy.decode_loop import DecodeLoop
from kleash.rpc.errors import DeadlineExceeded, PreconditionFailed, Unavailable

pytestmark = pytest.mark.unit

WAIT_S = 20.0
LENGTH = 12
"""Tokens of every response: nothing stops one earlier."""


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    return sharp(load_causal_lm(tiny_folder))


def sharp(model: Any) -> Any:
    """Larger weights: a fresh model is near uniform, and mistakes would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def train(model: Any, seed: int = 1) -> None:
    """Other weights, in place: far from the old ones, so that mixing them up shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * parameter.std() * noise if parameter.dim() > 1 else 0.05 * noise)


def requests_of(model: Any, count: int, **settings: Any) -> list[DecodeRequest]:
    """``count`` requests with prompts of 1 to 23 tokens."""
    rng = np.random.default_rng(5)
    return [
        DecodeRequest(
            prompt=rng.integers(0, model.config.vocab_size, length).astype(np.int32),
            prompt_id=f"p{index}",
            sample_index=0,
            seed=9,
            max_new_tokens=LENGTH,
            **settings,
        )
        for index, length in enumerate(rng.integers(1, 24, count))
    ]


def gap_after(model: Any, results: Sequence[Decoded], first: int) -> float:
    """Largest difference of log-probs from a whole forward, for tokens from ``first`` on."""
    sequences = [
        TokenSequence(np.append(its.request.prompt, its.ids), len(its.request.prompt))
        for its in results
    ]
    with torch.inference_mode():
        rows = response_log_probs(model, pack(sequences)).numpy()
    return max(
        float(np.abs(row[first : len(its.ids)] - its.log_probs[first:]).max())
        for row, its in zip(rows, results, strict=True)
    )


def assert_same(first: Sequence[Decoded], second: Sequence[Decoded]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.log_probs.tobytes() == b.log_probs.tobytes()


class World:
    """A loop whose steps are counted, and what it delivered."""

    def __init__(self, model: Any, *, max_slots: int = 2) -> None:
        self.model = model
        self.loop = DecodeLoop(
            lambda: Decoder(model, max_slots=max_slots, max_length=64, max_batch_tokens=40),
            max_queued_tokens=10_000,
            model_name="tiny",
        )
        self.finished: dict[str, Decoded] = {}
        self.errors: dict[str, Exception] = {}
        self.actions: dict[int, Callable[[], object]] = {}
        self.answered: list[threading.Event] = []
        self._num_steps = 0
        self._step = self.loop.decoder.step
        self.loop.decoder.step = self._count_step

    def at_step(self, number: int, action: Callable[[], object]) -> None:
        """Do ``action`` in the decoding thread during its step ``number``, the first being 1."""
        self.actions[number] = action

    def submit(self, requests: Sequence[DecodeRequest], *, name: str = "") -> Any:
        num_missing, is_answered = len(requests), threading.Event()

        def deliver(event: list[Decoded] | Exception) -> None:
            nonlocal num_missing
            if isinstance(event, Exception):
                self.errors[name] = event
                is_answered.set()
                return
            self.finished.update((its.request.prompt_id, its) for its in event)
            num_missing -= len(event)
            if not num_missing:
                is_answered.set()

        self.answered.append(is_answered)
        return self.loop.submit(requests, deliver)

    def serve(self) -> None:
        """Decode until every request is answered."""
        self.loop.start()
        for is_answered in self.answered:
            assert is_answered.wait(WAIT_S)
        self.loop.stop()

    def commit_at(
        self, step: int, mode: InFlight, version: int = 1, **settings: Any
    ) -> list[Future[Any]]:
        """Commit other weights during a step; the list gets the future."""
        futures: list[Future[Any]] = []
        self.at_step(
            step,
            lambda: futures.append(
                self.loop.commit(lambda: self.publish(version), mode, **settings)
            ),
        )
        return futures

    def publish(self, version: int) -> str:
        train(self.model, seed=version)
        self.loop.decoder.weights_version = version
        return f"version {version}"

    def _count_step(self) -> list[Decoded]:
        self._num_steps += 1
        if action := self.actions.get(self._num_steps):
            action()
        return self._step()


def test_keep_goes_on_with_old_keys_and_has_the_bits_of_a_bare_decoder(model: Any) -> None:
    requests = requests_of(model, 2)
    world = World(model)
    futures = world.commit_at(3, "keep")
    world.submit(requests)
    world.serve()
    committed = futures[0].result(0)
    assert committed.result == "version 1"
    assert committed.pause_ns > 0
    results = [world.finished[its.prompt_id] for its in requests]
    assert all(its.versions == [(0, 3, 0), (3, LENGTH, 1)] for its in results)
    assert gap_after(model, results, 3) > 1e-2  # old keys were read

    again = sharp(load_causal_lm(Path(model.config._name_or_path)))
    decoder = Decoder(again, max_slots=2, max_length=64, max_batch_tokens=40)
    decoder.add(requests)
    for _ in range(3):
        decoder.step()
    train(again)
    decoder.weights_version = 1
    assert_same(results, in_order(requests, rest_of(decoder)))


def rest_of(decoder: Decoder) -> list[Decoded]:
    finished: list[Decoded] = []
    while decoder.num_active:
        finished += decoder.step()
    return finished


def in_order(requests: Sequence[DecodeRequest], results: Sequence[Decoded]) -> list[Decoded]:
    by_id = {its.request.prompt_id: its for its in results}
    return [by_id[request.prompt_id] for request in requests]


def test_drain_lets_no_row_meet_two_versions(model: Any) -> None:
    requests = requests_of(model, 5)
    requests[0] = replace(requests[0], max_new_tokens=6)
    expected = generate(model, requests, max_slots=2)
    world = World(model)
    futures = world.commit_at(3, "drain")
    running: list[int] = []
    world.at_step(8, lambda: running.append(world.loop.decoder.num_active))
    world.submit(requests)
    world.serve()
    assert futures[0].result(0).result == "version 1"
    results = in_order(requests, list(world.finished.values()))
    assert running == [1]  # nobody took the free slot
    assert [its.versions for its in results[:2]] == [[(0, 6, 0)], [(0, LENGTH, 0)]]
    assert [its.versions for its in results[2:]] == [[(0, LENGTH, 1)]] * 3
    assert {its.finish_reason for its in results} == {"length"}
    assert [its.ids.tolist() for its in results[:2]] == [its.ids.tolist() for its in expected[:2]]
    assert gap_after(model, results[2:], 0) < 1e-5
    assert gap_after(model, results[:2], 0) > 1e-2


def test_a_drain_that_takes_too_long_changes_nothing(model: Any) -> None:
    requests = requests_of(model, 5)
    expected = generate(model, requests, max_slots=2)
    world = World(model)
    futures = world.commit_at(3, "drain", timeout_s=1e-6)
    world.submit(requests)
    world.serve()
    with pytest.raises(DeadlineExceeded, match="2 responses are still running; nothing was chang"):
        futures[0].result(0)
    results = in_order(requests, list(world.finished.values()))
    assert all(its.versions == [(0, LENGTH, 0)] for its in results)
    assert [its.ids.tolist() for its in results] == [its.ids.tolist() for its in expected]


def test_a_drain_may_be_cancelled(model: Any) -> None:
    world = World(model)
    futures = world.commit_at(3, "drain")
    were_cancelled: list[bool] = []
    world.at_step(5, lambda: were_cancelled.append(futures[0].cancel()))
    running: list[int] = []
    world.at_step(8, lambda: running.append(world.loop.decoder.num_active))
    first, *others = requests_of(model, 5)
    world.submit([replace(first, max_new_tokens=6), *others])
    world.serve()
    assert were_cancelled == [True]
    with pytest.raises(CancelledError):
        futures[0].result(0)
    assert running == [2]  # the free slot was taken at once
    assert len(world.finished) == 5
    assert {version for its in world.finished.values() for *_, version in its.versions} == {0}


def test_commits_take_turns(model: Any) -> None:
    """A keep does not overtake the drain before it, nor does a second drain."""
    world = World(model)
    futures = world.commit_at(3, "drain", version=1)
    later: list[Future[Any]] = []
    world.at_step(4, lambda: later.append(world.loop.commit(lambda: world.publish(2), "keep")))
    world.at_step(5, lambda: later.append(world.loop.commit(lambda: world.publish(3), "drain")))
    world.submit(requests_of(model, 3))
    world.serve()
    assert [its.result(0).result for its in [*futures, *later]] == [
        "version 1",
        "version 2",
        "version 3",
    ]
    versions = [world.finished[f"p{index}"].versions for index in range(3)]
    assert versions == [[(0, LENGTH, 0)], [(0, LENGTH, 0)], [(0, LENGTH, 3)]]


def test_requests_leave_while_draining(model: Any) -> None:
    """One that waits and one that runs are cancelled; the drain needs fewer steps for it."""
    requests = requests_of(model, 4)
    world = World(model)
    running = world.submit(requests[:1])
    world.submit(requests[1:2])
    waiting = world.submit(requests[2:3])
    world.submit(requests[3:])
    for gone in (0, 2):
        world.answered[gone].set()
    futures = world.commit_at(3, "drain")
    world.at_step(5, lambda: (world.loop.cancel(running), world.loop.cancel(waiting)))
    world.serve()
    assert futures[0].result(0).result == "version 1"
    assert {key: its.versions for key, its in world.finished.items()} == {
        "p1": [(0, LENGTH, 0)],
        "p3": [(0, LENGTH, 1)],
    }


def test_stopping_while_draining_ends(model: Any) -> None:
    world = World(model)
    futures = world.commit_at(3, "drain")
    world.at_step(4, lambda: world.loop.stop(wait=False))
    world.submit(requests_of(model, 3))
    world.loop.start()
    world.loop._thread.join(WAIT_S)
    assert not world.loop.is_alive
    assert futures[0].result(0).result == "version 1"
    assert world.finished["p2"].versions == [(0, LENGTH, 1)]
    with pytest.raises(Unavailable, match="is stopping"):
        world.loop.commit(lambda: None, "drain")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_reprefill_gives_the_log_probs_of_a_whole_forward(
    tiny_folders: dict[Kind, Path], kind: Kind
) -> None:
    """Rows of several micro-batches, one of them in another slot than at first."""
    model = sharp(load_causal_lm(tiny_folders[kind]))
    world = World(model, max_slots=6)
    requests = requests_of(model, 6)
    leaving = world.submit(requests[:1])
    world.answered[0].set()
    world.submit(requests[1:])
    world.at_step(2, lambda: world.loop.cancel(leaving))
    futures = world.commit_at(4, "reprefill")
    world.serve()
    assert futures[0].result(0).pause_ns > 0
    results = in_order(requests[1:], list(world.finished.values()))
    assert all(its.versions == [(0, 4, 0), (4, LENGTH, 1)] for its in results)
    assert gap_after(model, results, 4) < 1e-5
    assert gap_after(model, results, 3) > 1e-2


def test_abort_partial_ends_what_runs_and_starts_the_rest_anew(model: Any) -> None:
    requests = requests_of(model, 5)
    before = generate(model, requests[:2])
    world = World(model)
    futures = world.commit_at(3, "abort_partial")
    world.submit(requests)
    world.serve()
    assert futures[0].result(0).result == "version 1"
    results = in_order(requests, list(world.finished.values()))
    assert [its.finish_reason for its in results] == ["aborted"] * 2 + ["length"] * 3
    assert [its.versions for its in results] == [[(0, 3, 0)]] * 2 + [[(0, LENGTH, 1)]] * 3
    for aborted, whole in zip(results[:2], before, strict=True):
        assert aborted.ids.tolist() == whole.ids[:3].tolist()
        np.testing.assert_allclose(aborted.log_probs, whole.log_probs[:3], atol=1e-5)
    assert gap_after(model, results[2:], 0) < 1e-5


@pytest.mark.parametrize("mode", ["drain", "keep", "reprefill", "abort_partial"])
def test_a_commit_that_fails_leaves_rows_as_they_are(model: Any, mode: InFlight) -> None:
    requests = requests_of(model, 4)
    undisturbed = World(model)
    undisturbed.submit(requests)
    undisturbed.serve()
    world = World(model)
    futures: list[Future[Any]] = []

    def fail() -> None:
        raise ValueError("the digest differs.")

    world.at_step(3, lambda: futures.append(world.loop.commit(fail, mode)))
    world.submit(requests)
    world.serve()
    with pytest.raises(ValueError, match="the digest differs"):
        futures[0].result(0)
    assert_same(
        in_order(requests, list(undisturbed.finished.values())),
        in_order(requests, list(world.finished.values())),
    )
    assert all(its.versions == [(0, LENGTH, 0)] for its in world.finished.values())
    assert {its.finish_reason for its in world.finished.values()} == {"length"}


def test_spans_of_a_rollback(model: Any) -> None:
    """Versions fall as well as rise; one that drew nothing leaves no trace."""
    decoder = Decoder(model, max_slots=2, max_length=64)
    decoder.weights_version = 4
    decoder.add(requests_of(model, 1))
    for version, num_tokens in ((5, 2), (4, 3), (5, 0), (4, 1), (6, 0), (3, 2)):
        decoder.weights_version = version
        for _ in range(num_tokens):
            decoder.step()
    (result,) = rest_of(decoder)
    assert result.versions == [(0, 2, 5), (2, 6, 4), (6, LENGTH, 3)]


def test_a_rollback_ends_requests_that_want_newer_weights(model: Any) -> None:
    """One that runs ends at once, one that waits when it would start; the others go on."""
    requests = requests_of(model, 2)
    newer = requests_of(model, 3, min_version=1)
    world = World(model)
    world.loop.decoder.weights_version = 1
    world.submit(newer[:1], name="running")
    world.submit(requests[1:], name="modest")
    world.submit(newer[2:], name="waiting")
    futures = world.commit_at(3, "keep", version=0)
    world.serve()
    assert futures[0].result(0).result == "version 0"
    assert sorted(world.errors) == ["running", "waiting"]
    for error in world.errors.values():
        assert isinstance(error, PreconditionFailed)
        assert error.reason == "WEIGHTS_TOO_OLD"
        assert error.metadata == {"requested": "1", "served": "0"}
        assert "weights version 1 is required and version 0 is served" in str(error)
    assert {key: its.versions for key, its in world.finished.items()} == {
        "p1": [(0, 3, 1), (3, LENGTH, 0)]
    }
    assert world.loop._budget.num_tokens == 0
