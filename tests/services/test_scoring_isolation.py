"""Isolated calls give the same bits whatever the traffic, and so does the model in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kleash.client.reference import ReferenceClient
from kleash.client.reward import RewardClient
from kleash.lm.sequences import TokenSequence
from kleash.reference.config import ReferenceConfig, ReferenceLimits
from kleash.reference.local import LocalReference
from kleash.reference.service import ReferenceService
from kleash.reward.config import RewardConfig
from kleash.reward.local import LocalReward
from kleash.reward.service import RewardService
from kleash.rpc.batcher import Batcher
from kleash.rpc.errors import InvalidRequest, NotFound, PreconditionFailed
from kleash.rpc.requests import Limits
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.rpc.work import isolated_batches

pytestmark = pytest.mark.services

LIMITS = Limits(max_items=50, max_batch_tokens=700)
REFERENCE_LIMITS = ReferenceLimits(max_items=50, max_batch_tokens=700)


@pytest.fixture(scope="module")
def address(tiny_folder: Path, tiny_reward_folder: Path) -> Iterator[str]:
    """Reward and reference packed into one process."""
    services = [
        RewardService(RewardConfig(model=tiny_reward_folder, limits=LIMITS)),
        ReferenceService(ReferenceConfig(model=tiny_folder, limits=REFERENCE_LIMITS)),
    ]
    with BackgroundServer(services, ServerConfig()) as server:
        yield server.address


@pytest.fixture(scope="module")
def local_reward(tiny_reward_folder: Path) -> LocalReward:
    return LocalReward.load(RewardConfig(model=tiny_reward_folder, limits=LIMITS))


@pytest.fixture(scope="module")
def local_reference(tiny_folder: Path) -> LocalReference:
    return LocalReference.load(ReferenceConfig(model=tiny_folder, limits=REFERENCE_LIMITS))


def random_sequences(count: int, *, seed: int) -> list[TokenSequence]:
    random = np.random.default_rng(seed)
    sequences = []
    for length in random.integers(2, 120, count):
        ids = random.integers(5, 300, length).astype(np.int32)
        sequences.append(TokenSequence(ids, int(random.integers(1, length))))
    return sequences


@contextmanager
def traffic(call: Any) -> Iterator[None]:
    """Other callers who keep the batcher mixing while the block runs."""
    is_over = threading.Event()

    def hammer(seed: int) -> int:
        num_calls = 0
        while not is_over.is_set():
            call(random_sequences(7, seed=seed + num_calls))
            num_calls += 1
        return num_calls

    with ThreadPoolExecutor(3) as threads:
        callers = [threads.submit(hammer, seed) for seed in (1000, 2000, 3000)]
        try:
            yield
        finally:
            is_over.set()
        assert all(caller.result() > 0 for caller in callers)


def test_isolated_scores_are_bit_identical_under_traffic(
    address: str, local_reward: LocalReward
) -> None:
    """130 items, so three calls: the service under load == itself == the model in this process."""
    sequences = random_sequences(130, seed=1)
    digest = local_reward.get_model().tokenizer_sha256
    here = [s.score for s in local_reward.score_tokens(sequences, tokenizer_sha256=digest)]
    with (
        RewardClient(address) as client,
        RewardClient(address) as others,
        traffic(lambda batch: others.score_tokens(batch, tokenizer_sha256=digest)),
    ):
        for _ in range(5):
            scores = client.score_tokens(sequences, tokenizer_sha256=digest, isolate=True)
            assert [score.score for score in scores] == here


def test_isolated_log_probs_are_bit_identical_under_traffic(
    address: str, local_reference: LocalReference
) -> None:
    sequences = random_sequences(130, seed=2)
    digest = local_reference.get_model().tokenizer_sha256
    here = local_reference.log_probs(sequences, temperature=0.7, tokenizer_sha256=digest)
    with (
        ReferenceClient(address) as client,
        ReferenceClient(address) as others,
        traffic(lambda batch: others.log_probs(batch, temperature=0.7, tokenizer_sha256=digest)),
    ):
        for _ in range(5):
            there = client.log_probs(
                sequences, temperature=0.7, tokenizer_sha256=digest, isolate=True
            )
            assert all(map(np.array_equal, there, here))


def test_local_reward_is_the_client_without_grpc(address: str, local_reward: LocalReward) -> None:
    """Same answers and same errors from every method."""
    conversation = [
        {"role": "user", "content": "Which is bigger, 9 or 12?"},
        {"role": "assistant", "content": "12 is bigger."},
    ]
    with RewardClient(address) as client:
        assert local_reward.get_model() == client.get_model()
        for call in (
            lambda c: [s.score for s in c.score_texts(["hello", "the fox"], isolate=True)],
            lambda c: [s.score for s in c.score_conversations([conversation], isolate=True)],
            lambda c: c.compare("9 or 12?", ["9", "12 is bigger."], isolate=True).preference,
            lambda c: c.count_tokens(["hello", conversation]),
        ):
            assert call(local_reward) == call(client)
        error_cases: list[tuple[Any, type[Exception]]] = [
            (lambda c: c.compare("hello", ["one"]), InvalidRequest),
            (
                lambda c: c.score_tokens(random_sequences(1, seed=3), tokenizer_sha256="0"),
                PreconditionFailed,
            ),
            (lambda c: c.count_tokens([""]), InvalidRequest),
        ]
        for call, error_class in error_cases:
            messages = []
            for caller in (local_reward, client):
                with pytest.raises(error_class) as caught:
                    call(caller)
                messages.append(str(caught.value))
            assert messages[0] == messages[1]


@pytest.mark.parametrize("seed", range(5))
def test_isolated_batches_are_those_of_the_batcher(seed: int) -> None:
    """What is computed here is split exactly as the batcher splits an isolated call."""
    lengths = np.random.default_rng(seed).integers(1, 200, 80).tolist()
    seen: list[list[int]] = []

    def compute(jobs: list[int]) -> list[int]:
        seen.append(list(jobs))
        return jobs

    async def submit() -> None:
        batcher = Batcher(
            compute,
            size=lambda job: lengths[job],
            max_batch_tokens=1000,
            max_queued_tokens=10**6,
            service="test",
        )
        await batcher.start()
        await batcher.submit(range(80), isolate=True)
        await batcher.stop()

    asyncio.run(submit())
    batches = isolated_batches(lengths, 1000)
    assert seen == batches
    assert sorted(index for batch in batches for index in batch) == list(range(80))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 1000 for batch in batches)


def test_wrong_service_behind_the_address(tiny_folder: Path) -> None:
    """A reward client that reaches a reference service says so; it does not hang."""
    service = ReferenceService(ReferenceConfig(model=tiny_folder))
    with (
        BackgroundServer([service], ServerConfig()) as server,
        RewardClient(server.address, timeout_s=10) as client,
        pytest.raises(Exception, match=server.address) as caught,
    ):
        client.get_model()
    assert not isinstance(caught.value, NotFound)
