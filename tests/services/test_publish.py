"""Publishing weights over real gRPC: what the trainer sends is what the policy generates with."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kleash.client.policy import PolicyClient
from kleash.client.types import GeneratedSequence, Prompt, Sampling
from kleash.client.weights import WeightsClient
from kleash.lm.decode import DecodeRequest, generate
from kleash.lm.digest import canonical_tensors, model_digest
from kleash.lm.load import load_causal_lm
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sequences import TokenSequence, pack
from kleash.lm.tiny import Kind
from kleash.policy.config import PolicyConfig, PolicyLimits
from kleash.policy.local import LocalPolicy, LocalWeights
from kleash.policy.service import PolicyService
from kleash.ppo.publish import Publisher, build_manifest, chunks
from kleash.rpc.errors import (
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    PreconditionFailed,
    ServiceError,
)
from kleash.rpc.server import BackgroundServer
from kleash.weights.v1 import weights_pb2

pytestmark = pytest.mark.services

LIMITS = PolicyLimits(max_item_tokens=256)


class Replica:
    """A policy service and a client of its weights."""

    def __init__(self, service: PolicyService, address: str) -> None:
        self.address = address
        self.engine = service.engine
        self.weights = WeightsClient(address)
        self.policy = PolicyClient(address)

    @property
    def digest(self) -> str:
        """Of the tensors that the replica computes with."""
        return model_digest(self.engine.frozen.model)


@pytest.fixture
def replica(tiny_folder: Path) -> Iterator[Replica]:
    yield from start(tiny_folder)


@pytest.fixture
def second_replica(tiny_folder: Path) -> Iterator[Replica]:
    yield from start(tiny_folder)


def start(folder: Path, **settings: Any) -> Iterator[Replica]:
    service = PolicyService(PolicyConfig(model=folder, limits=LIMITS, **settings))
    with BackgroundServer([service]) as server:
        replica = Replica(service, server.address)
        with replica.weights, replica.policy:
            yield replica


@pytest.fixture
def trained(tiny_folder: Path) -> Any:
    return after_training(tiny_folder)


def after_training(folder: Path, seed: int = 0) -> Any:
    """The model of ``folder`` with every tensor moved."""
    model = load_causal_lm(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def prompts_of(count: int) -> list[Prompt]:
    rng = np.random.default_rng(1)
    return [Prompt(f"p{n}", rng.integers(5, 260, 6).astype(np.int32)) for n in range(count)]


def tokens_by_id(sequences: Any) -> dict[str, list[int]]:
    return {its.prompt_id: its.ids.tolist() for its in sequences}


def log_probs_of(model: Any, prompt: Prompt, its: GeneratedSequence) -> np.ndarray:
    whole = TokenSequence(np.append(prompt.ids, its.ids), len(prompt.ids))
    with torch.inference_mode():
        return response_log_probs(model, pack([whole]))[0].numpy()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_policy_generates_with_the_published_weights(
    tiny_folders: dict[Kind, Path], kind: Kind
) -> None:
    model = after_training(tiny_folders[kind])
    prompts, sampling = prompts_of(8), Sampling(seed=4, max_new_tokens=12)
    for replica in start(tiny_folders[kind]):
        report = Publisher([replica.weights], "run", 1).publish(model, 1)
        assert report.digest == model_digest(model) == replica.digest
        assert replica.weights.get_weights().digest == report.digest
        assert report.version == replica.policy.get_policy().weights_version == 1
        assert report.bytes == sum(tensor.nbytes for tensor in canonical_tensors(model).values())
        assert 0 < report.pause_s < report.seconds
        found = list(replica.policy.generate(prompts, sampling, min_weights_version=1))
        eos = frozenset([model.config.eos_token_id])
        requests = [
            DecodeRequest(its.ids, its.prompt_id, 0, 4, 12, stop_ids=eos) for its in prompts
        ]
        expected = {its.request.prompt_id: its for its in generate(model, requests)}
        for its in found:
            assert its.ids.tolist() == expected[its.prompt_id].ids.tolist()
            assert np.abs(its.log_probs - expected[its.prompt_id].log_probs).max() < 1e-5
            assert {span.weights_version for span in its.version_spans} == {1}


def test_publishing_again_is_harmless(replica: Replica, trained: Any) -> None:
    publisher = Publisher([replica.weights], "run", 1)
    first = publisher.publish(trained, 1)
    again = publisher.publish(trained, 1)
    assert (again.version, again.digest, again.bytes) == (1, first.digest, 0)


def test_every_replica_gets_the_version(
    replica: Replica, second_replica: Replica, trained: Any
) -> None:
    """Also one that was restarted: it takes the version that the other one has already."""
    Publisher([replica.weights], "run", 1).publish(trained, 1)
    both = Publisher([replica.weights, second_replica.weights], "run", 1)
    report = both.publish(trained, 1)
    assert report.bytes == sum(tensor.nbytes for tensor in canonical_tensors(trained).values())
    assert replica.digest == second_replica.digest == report.digest


def test_bfloat16_replicas_serve_the_rounded_bits(tiny_folder: Path, trained: Any) -> None:
    for replica in start(tiny_folder, dtype="bfloat16"):
        report = Publisher([replica.weights], "run", 1).publish(trained, 1)
        assert report.digest == model_digest(trained.to(torch.bfloat16)) == replica.digest


def test_in_process_publishing_is_the_same(replica: Replica, trained: Any) -> None:
    policy = LocalPolicy(replica.engine)
    report = Publisher([LocalWeights(replica.engine)], "run", 1).publish(trained, 1)
    assert report.digest == replica.digest == policy.get_policy().model.revision


def test_another_architecture_is_refused(replica: Replica, tiny_folders: dict[Kind, Path]) -> None:
    before = replica.digest
    with pytest.raises(PreconditionFailed, match="serve the checkpoint") as caught:
        Publisher([replica.weights], "run", 1).publish(load_causal_lm(tiny_folders["gpt2"]), 1)
    assert caught.value.reason == "SCHEMA_MISMATCH"
    tensors = canonical_tensors(load_causal_lm(tiny_folders["gpt2"]))
    manifest = build_manifest(tensors, run_id="run", fence=1, version=1)
    with pytest.raises(PreconditionFailed, match="do not fit the served model") as caught:
        replica.weights.publish(manifest, chunks(tensors))
    assert caught.value.reason == "SCHEMA_MISMATCH"
    assert replica.digest == before


def test_a_trainer_that_was_replaced_is_refused(replica: Replica, trained: Any) -> None:
    Publisher([replica.weights], "run", 2).publish(trained, 1)
    before = replica.digest
    with torch.no_grad():
        trained.model.norm.weight.add_(1)
    with pytest.raises(PermissionDenied, match="another trainer has taken over") as caught:
        Publisher([replica.weights], "run", 1).publish(trained, 2)
    assert caught.value.reason == "STALE_FENCE"
    assert replica.digest == before


@pytest.mark.parametrize("fault", ["bit flip", "torn", "no manifest", "two manifests"])
def test_a_faulty_stream_leaves_the_old_weights_serving(
    replica: Replica, trained: Any, fault: str
) -> None:
    tensors = canonical_tensors(trained)
    manifest = build_manifest(tensors, run_id="run", fence=1, version=1)
    parts = list(chunks(tensors))
    prompts, sampling = prompts_of(4), Sampling(seed=0, max_new_tokens=8)
    before = (replica.digest, tokens_by_id(replica.policy.generate(prompts, sampling)))
    frames = [weights_pb2.PublishRequest(chunk=chunk) for chunk in parts]
    first = weights_pb2.PublishRequest(manifest=manifest)
    error: type[ServiceError] = InvalidRequest
    if fault == "bit flip":
        frames[2].chunk.data = bytes([frames[2].chunk.data[0] ^ 1]) + frames[2].chunk.data[1:]
        frames.insert(0, first)
        error = PreconditionFailed
    elif fault == "torn":
        frames = [first, *frames[:-1]]
    elif fault == "two manifests":
        frames = [first, first, *frames]
    with pytest.raises(error):
        publish_frames(replica, frames)
    found = tokens_by_id(replica.policy.generate(prompts, sampling))
    assert (replica.digest, found) == before
    assert replica.weights.get_weights().version == 0
    report = Publisher([replica.weights], "run", 1).publish(trained, 1)
    assert report.digest == replica.digest == model_digest(trained)


def publish_frames(replica: Replica, frames: list[weights_pb2.PublishRequest]) -> None:
    """Send exactly these frames."""
    import grpc

    from kleash.rpc.errors import from_rpc_error
    from kleash.weights.v1 import weights_pb2_grpc

    with grpc.insecure_channel(replica.address) as channel:
        try:
            weights_pb2_grpc.WeightsServiceStub(channel).Publish(iter(frames), timeout=20)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def test_a_publish_in_the_middle_of_a_generation(
    replica: Replica, trained: Any, tiny_folder: Path
) -> None:
    """Running sequences go on with the keys they have; spans name both versions, without gaps."""
    prompts = prompts_of(8)
    sampling = Sampling(seed=2, max_new_tokens=240, stop_token_ids=(0,))
    found: list[GeneratedSequence] = []
    reader = threading.Thread(
        target=lambda: found.extend(replica.policy.generate(prompts, sampling))
    )
    is_half_way = threading.Event()
    steps = itertools.count()

    def slow_down(*_: object) -> None:
        time.sleep(0.005)
        if next(steps) == 25:
            is_half_way.set()

    handle = replica.engine.frozen.model.lm_head.register_forward_pre_hook(slow_down)
    reader.start()
    assert is_half_way.wait(20)
    Publisher([replica.weights], "run", 1).publish(trained, 1)
    handle.remove()
    reader.join()
    mixed = [its for its in found if len(its.version_spans) == 2]
    assert mixed
    old = load_causal_lm(tiny_folder)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    for its in mixed:
        first, second = its.version_spans
        assert (first.start, first.end, second.end) == (0, second.start, len(its.ids))
        assert (first.weights_version, second.weights_version) == (0, 1)
        with_old = log_probs_of(old, by_id[its.prompt_id], its)
        gap = np.abs(its.log_probs - with_old)
        assert gap[: first.end].max() < 1e-5
        assert gap[first.end :].max() > 1e-3  # ppo.md row 35: stale weights would be seen
    unmixed = replica.policy.generate(prompts, sampling, min_weights_version=1)
    assert {len(its.version_spans) for its in unmixed} == {1}


def test_two_publishes_at_a_time(replica: Replica, trained: Any) -> None:
    """The second one is told to wait; a greater fence takes the place of the first."""
    tensors = canonical_tensors(trained)
    parts = list(chunks(tensors))
    is_started, may_go_on = threading.Event(), threading.Event()
    outcome: list[Any] = []

    def stalled() -> Iterator[weights_pb2.Chunk]:
        yield parts[0]
        is_started.set()
        assert may_go_on.wait(20)
        yield from parts[1:]

    def first() -> None:
        try:
            manifest = build_manifest(tensors, run_id="run", fence=1, version=1)
            outcome.append(replica.weights.publish(manifest, stalled()))
        except ServiceError as error:
            outcome.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert is_started.wait(20)
    wait_for_fence(replica, 1)
    with pytest.raises(Overloaded, match="is being published") as caught:
        Publisher([replica.weights], "run", 1).publish(trained, 2)
    assert caught.value.reason == "PUBLISH_IN_PROGRESS"
    report = Publisher([replica.weights], "run", 2).publish(trained, 7)
    may_go_on.set()
    thread.join()
    assert isinstance(outcome[0], PermissionDenied)
    assert outcome[0].reason == "STALE_FENCE"
    assert replica.weights.get_weights().version == 7
    assert replica.digest == report.digest


def wait_for_fence(replica: Replica, fence: int) -> None:
    end = time.monotonic() + 10
    while replica.weights.get_weights().fence != fence:
        assert time.monotonic() < end
        time.sleep(0.005)


HALF_A_PUBLISH = """
import sys, time
from kleash.client.weights import WeightsClient
from kleash.weights.v1 import weights_pb2

manifest = weights_pb2.Manifest.FromString(open(sys.argv[2], "rb").read())
chunk = weights_pb2.Chunk.FromString(open(sys.argv[3], "rb").read())

def chunks():
    yield chunk
    print("half way", flush=True)
    time.sleep(60)

WeightsClient(sys.argv[1]).publish(manifest, chunks())
"""


def test_a_publisher_that_is_killed_leaves_the_old_version(
    replica: Replica, trained: Any, tmp_path: Path
) -> None:
    before = replica.digest
    tensors = canonical_tensors(trained)
    manifest = build_manifest(tensors, run_id="run", fence=1, version=1)
    (tmp_path / "manifest").write_bytes(manifest.SerializeToString())
    (tmp_path / "chunk").write_bytes(next(chunks(tensors)).SerializeToString())
    arguments = [replica.address, str(tmp_path / "manifest"), str(tmp_path / "chunk")]
    with subprocess.Popen(
        [sys.executable, "-c", HALF_A_PUBLISH, *arguments], stdout=subprocess.PIPE
    ) as publisher:
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == b"half way\n"
        wait_for_fence(replica, 1)
        publisher.kill()
    assert replica.digest == before
    assert replica.weights.get_weights().version == 0
    end = time.monotonic() + 10
    while True:
        try:
            report = Publisher([replica.weights], "run", 1).publish(trained, 1)
            break
        except Overloaded:  # until the server sees that the connection is gone
            assert time.monotonic() < end
            time.sleep(0.05)
    assert replica.digest == report.digest == model_digest(trained)
