"""The policy service's queue over real gRPC: admission, cancellation, deadlines, signs of life."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kleash.client.policy import PolicyClient
from kleash.client.types import Prompt, Sampling
from kleash.policy.config import PolicyConfig, PolicyLimits
from kleash.policy.local import LocalPolicy
from kleash.policy.service import PolicyService
from kleash.rpc.errors import DeadlineExceeded, InvalidRequest, Overloaded
from kleash.rpc.server import BackgroundServer

pytestmark = pytest.mark.services

CONTEXT = 128
FULL = Sampling(seed=0, max_new_tokens=CONTEXT, stop_token_ids=(0,))
"""Responses run to their length: the stop id is drawn once in 270 tokens."""


@pytest.fixture(scope="module")
def service(tiny_folder: Path) -> PolicyService:
    """Two slots, and a queue of eight whole sequences."""
    limits = PolicyLimits(
        max_item_tokens=CONTEXT, max_batch_tokens=1024, max_queued_tokens=8 * CONTEXT
    )
    return PolicyService(PolicyConfig(model=tiny_folder, max_running_sequences=2, limits=limits))


@pytest.fixture(scope="module")
def server(service: PolicyService) -> Iterator[BackgroundServer]:
    with BackgroundServer([service]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[PolicyClient]:
    with PolicyClient(server.address) as client:
        yield client


@pytest.fixture
def slow(service: PolicyService) -> Iterator[None]:
    """Every step takes 5 ms longer: time to look at what is queued."""
    head = service.engine.frozen.model.lm_head
    handle = head.register_forward_pre_hook(lambda *_: time.sleep(0.005))
    yield
    handle.remove()
    loop = service.engine.loop
    wait_until(lambda: loop.heartbeat_age_s == 0, "an idle engine")
    assert loop.decoder.num_active == 0


def prompts_of(count: int, *, seed: int = 0) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [
        Prompt(f"p{index}", rng.integers(5, 260, rng.integers(1, 20)).astype(np.int32))
        for index in range(count)
    ]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, f"not within 10 s: {what}"
        time.sleep(0.002)


def test_a_request_that_no_queue_could_take_is_invalid(client: PolicyClient) -> None:
    with pytest.raises(InvalidRequest, match=f"may need {9 * CONTEXT} tokens") as caught:
        list(client.generate(prompts_of(9), FULL))
    assert caught.value.field == "prompts"


def test_a_full_queue_refuses_at_once_with_a_time_to_retry(
    client: PolicyClient, service: PolicyService, slow: None
) -> None:
    running = client.generate(prompts_of(8), FULL)
    reader = threading.Thread(target=lambda: list(running))
    reader.start()
    loop = service.engine.loop
    wait_until(lambda: loop.decoder.num_active == 2, "two running sequences")
    another = LocalPolicy(service.engine).generate(prompts_of(8, seed=1), FULL)
    try:
        with pytest.raises(Overloaded, match=r"holds \d+ of at most 1024 tokens") as caught:
            next(another)
    finally:
        reader.join()
    assert caught.value.reason == "QUEUE_FULL"
    assert 0 < (caught.value.retry_after_s or 0) <= 10


def test_a_caller_that_leaves_gives_its_slots_back(
    client: PolicyClient, service: PolicyService, slow: None
) -> None:
    decoder = service.engine.loop.decoder
    prompts = [*prompts_of(6), Prompt("short", np.full(CONTEXT - 1, 9, np.int32))]
    arrivals = client.generate(prompts[::-1], FULL)
    assert next(arrivals).prompt_id == "short"
    wait_until(lambda: decoder.num_active == 2, "two running sequences")
    began = time.monotonic()
    arrivals.close()
    wait_until(lambda: decoder.num_active == 0, "free slots")
    assert time.monotonic() - began < 1  # the rest would have taken more than 2 s
    (its,) = client.generate([prompts[0]], Sampling(seed=0, max_new_tokens=2))
    assert len(its.ids) == 2


def test_a_deadline_gives_the_slots_back(
    server: BackgroundServer, service: PolicyService, slow: None
) -> None:
    with PolicyClient(server.address, timeout_s=0.3) as client:
        client.get_policy()  # connected
        with pytest.raises(DeadlineExceeded):
            list(client.generate(prompts_of(6), FULL))
    wait_until(lambda: service.engine.loop.decoder.num_active == 0, "free slots")


def test_heartbeat_and_readiness(client: PolicyClient, service: PolicyService, slow: None) -> None:
    assert service.is_ready("kleash.policy.v1.PolicyService")
    assert service.heartbeat_age_s() == 0
    gate = threading.Event()
    service.engine.loop.run(lambda: gate.wait(10))
    time.sleep(0.15)
    assert service.heartbeat_age_s() > 0.1
    gate.set()
    wait_until(lambda: service.heartbeat_age_s() == 0, "an idle engine")
