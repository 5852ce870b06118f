"""The policy service over real gRPC: generation, validation, admission, cancellation, failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from kleash.base.errors import ModelError
from kleash.base.version import software_version
from kleash.client.policy import PolicyClient
from kleash.client.types import GeneratedSequence, Prompt, Sampling
from kleash.lm.digest import chat_template_sha256, model_digest, tokenizer_sha256
from kleash.lm.load import load_causal_lm, load_tokenizer
from kleash.lm.log_probs import response_log_probs
from kleash.lm.sequences import TokenSequence, pack
from kleash.lm.tiny import Kind
from kleash.policy.config import PolicyConfig, PolicyLimits
from kleash.policy.local import LocalPolicy
from kleash.policy.service import PolicyService
from kleash.policy.v1 import policy_pb2, policy_pb2_grpc
from kleash.rpc.codec import encode_ids
from kleash.rpc.errors import (
    InternalError,
    InvalidRequest,
    PreconditionFailed,
    ServiceError,
    from_rpc_error,
)
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

CONTEXT = 128
LIMITS = PolicyLimits(
    max_items=64, max_item_tokens=CONTEXT, max_batch_tokens=1024, max_queued_tokens=8192
)
RARE = (0,)
"""A stop id that is drawn once in 270 tokens: responses run to their length."""


@pytest.fixture(scope="module")
def service(tiny_folder: Path) -> PolicyService:
    return PolicyService(PolicyConfig(model=tiny_folder, max_running_sequences=8, limits=LIMITS))


@pytest.fixture(scope="module")
def server(service: PolicyService) -> Iterator[BackgroundServer]:
    with BackgroundServer([service], ServerConfig()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[PolicyClient]:
    with PolicyClient(server.address) as client:
        yield client


@pytest.fixture
def stub(server: BackgroundServer) -> Iterator[policy_pb2_grpc.PolicyServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield policy_pb2_grpc.PolicyServiceStub(channel)


def prompts_of(count: int, *, seed: int = 0, num_samples: int = 1) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [
        Prompt(f"p{index}", rng.integers(5, 260, rng.integers(1, 20)).astype(np.int32), num_samples)
        for index in range(count)
    ]


def by_key(sequences: Any) -> dict[tuple[str, int], GeneratedSequence]:
    return {(its.prompt_id, its.sample_index): its for its in sequences}


def test_get_policy_describes_what_is_served(client: PolicyClient, tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    policy = client.get_policy()
    assert policy.model.name == tiny_folder.name
    assert policy.model.revision == model_digest(load_causal_lm(tiny_folder))
    assert policy.weights_version == 0
    assert policy.tokenizer_sha256 == tokenizer_sha256(tokenizer)
    assert policy.chat_template_sha256 == chat_template_sha256(tokenizer)
    assert policy.dtype == "float32"
    assert policy.vocab_size == len(tokenizer)
    assert policy.limits.max_item_tokens == CONTEXT
    assert policy.max_running_sequences == 8
    assert policy.server_version == software_version()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_generate_over_grpc(tiny_folders: dict[Kind, Path], kind: Kind) -> None:
    """ppo.md section 4, rows 1, 2, 29, 34: what arrives equals a whole forward, at T = 0.7."""
    config = PolicyConfig(model=tiny_folders[kind], max_running_sequences=8, limits=LIMITS)
    model = load_causal_lm(tiny_folders[kind])
    prompts = prompts_of(12, num_samples=2)
    with (
        BackgroundServer([PolicyService(config)]) as server,
        PolicyClient(server.address) as client,
    ):
        sampling = Sampling(seed=3, max_new_tokens=24, temperature=0.7)
        found = by_key(client.generate(prompts, sampling))
    assert sorted(found) == sorted((prompt.prompt_id, k) for prompt in prompts for k in range(2))
    eos = model.config.eos_token_id
    for prompt in prompts:
        for sample in range(2):
            its = found[prompt.prompt_id, sample]
            whole = TokenSequence(np.append(prompt.ids, its.ids), len(prompt.ids))
            with torch.inference_mode():
                expected = response_log_probs(model, pack([whole]), 0.7)[0].numpy()
            assert np.abs(its.log_probs - expected).max() < 1e-5
            assert (its.ids[-1] == eos) == (its.finish_reason == "stop")
            assert its.finish_reason == "stop" or len(its.ids) == 24
            assert [(s.start, s.end, s.weights_version) for s in its.version_spans] == [
                (0, len(its.ids), 0)
            ]


def test_a_run_in_process_gives_the_same_bits(client: PolicyClient, service: PolicyService) -> None:
    """Same tokens, log-probs and order of arrival: the trainer groups by that order."""
    prompts, sampling = prompts_of(30), Sampling(seed=1, max_new_tokens=30, temperature=0.9)
    local = LocalPolicy(service.engine)
    for _ in range(2):
        remote = list(client.generate(prompts, sampling))
        for a, b in zip(remote, local.generate(prompts, sampling), strict=True):
            assert (a.prompt_id, a.sample_index) == (b.prompt_id, b.sample_index)
            assert a.ids.tobytes() == b.ids.tobytes()
            assert a.log_probs.tobytes() == b.log_probs.tobytes()
            assert (a.finish_reason, a.version_spans) == (b.finish_reason, b.version_spans)


def test_part_of_the_samples_may_be_asked_for_again(client: PolicyClient) -> None:
    sampling = Sampling(seed=1, max_new_tokens=16)
    prompts = prompts_of(3, num_samples=5)
    whole = by_key(client.generate(prompts, sampling))
    part = [Prompt(its.prompt_id, its.ids, 2, first_sample_index=3) for its in prompts[1:]]
    again = by_key(client.generate(part, sampling))
    assert sorted(again) == [("p1", 3), ("p1", 4), ("p2", 3), ("p2", 4)]
    for key, its in again.items():
        assert its.ids.tolist() == whole[key].ids.tolist()
        assert np.abs(its.log_probs - whole[key].log_probs).max() < 1e-5


def test_concurrent_requests_do_not_change_each_other(client: PolicyClient) -> None:
    sampling = Sampling(seed=5, max_new_tokens=20)
    alone = [by_key(client.generate(prompts_of(6, seed=n), sampling)) for n in range(4)]
    together: list[dict] = [{} for _ in range(4)]

    def run(n: int) -> None:
        together[n] = by_key(client.generate(prompts_of(6, seed=n), sampling))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together, strict=True):
        assert {key: its.ids.tolist() for key, its in a.items()} == {
            key: its.ids.tolist() for key, its in b.items()
        }


def test_responses_arrive_as_they_finish(client: PolicyClient) -> None:
    """A short one is there while a long one still runs."""
    prompts = [
        Prompt("long", np.array([7], np.int32)),
        Prompt("short", np.full(CONTEXT - 2, 9, np.int32)),
    ]
    arrivals = client.generate(prompts, Sampling(seed=0, max_new_tokens=100, stop_token_ids=RARE))
    assert next(arrivals).prompt_id == "short"
    assert next(arrivals).prompt_id == "long"


def test_the_context_limit_is_a_length(client: PolicyClient) -> None:
    prompt = Prompt("p", np.full(CONTEXT - 3, 9, np.int32))
    (its,) = client.generate([prompt], Sampling(seed=0, max_new_tokens=50, stop_token_ids=RARE))
    assert (len(its.ids), its.finish_reason) == (3, "length")


def a_request() -> policy_pb2.GenerateRequest:
    return policy_pb2.GenerateRequest(
        prompts=[
            policy_pb2.Prompt(prompt_id=name, tokens=encode_ids(np.array([5, 6], np.int32)))
            for name in ("a", "b")
        ],
        sampling=policy_pb2.SamplingParams(max_new_tokens=4),
    )


def set_tokens(index: int, ids: list[int]) -> Callable[[policy_pb2.GenerateRequest], None]:
    def spoil(request: policy_pb2.GenerateRequest) -> None:
        request.prompts[index].tokens.CopyFrom(encode_ids(np.array(ids, np.int32)))

    return spoil


def set_sampling(**changes: Any) -> Callable[[policy_pb2.GenerateRequest], None]:
    def spoil(request: policy_pb2.GenerateRequest) -> None:
        request.sampling.MergeFrom(policy_pb2.SamplingParams(**changes))

    return spoil


def same_ids(request: policy_pb2.GenerateRequest) -> None:
    request.prompts[1].prompt_id = "a"


def no_prompts(request: policy_pb2.GenerateRequest) -> None:
    del request.prompts[:]


def no_length(request: policy_pb2.GenerateRequest) -> None:
    request.sampling.max_new_tokens = 0


def many_samples(request: policy_pb2.GenerateRequest) -> None:
    request.prompts[1].num_samples = 64


def torn_ids(request: policy_pb2.GenerateRequest) -> None:
    request.prompts[1].tokens.count = 3


def high_index(request: policy_pb2.GenerateRequest) -> None:
    request.prompts[0].first_sample_index = 2**32 - 1
    request.prompts[0].num_samples = 2


@pytest.mark.parametrize(
    ("spoil", "field", "sentence"),
    [
        (no_prompts, "prompts", "empty"),
        (same_ids, "prompts[1].prompt_id", "'a' is that of prompts[0]"),
        (set_tokens(1, []), "prompts[1].tokens", "empty"),
        (set_tokens(0, [5] * CONTEXT), "prompts[0].tokens", f"{CONTEXT} tokens"),
        (set_tokens(0, [5, 9999]), "prompts[0].tokens", "token id 9999 at position 1"),
        (set_tokens(0, [-1]), "prompts[0].tokens", "token id -1 at position 0"),
        (torn_ids, "prompts[1].tokens.ids_i32", "8 bytes but its count is 3"),
        (high_index, "prompts[0].first_sample_index", "use lower indices"),
        (many_samples, "prompts", "65 entries and the limit is 64"),
        (no_length, "sampling.max_new_tokens", "is 0"),
        (set_sampling(temperature=-0.5), "sampling.temperature", "is -0.5"),
        (set_sampling(temperature=float("nan")), "sampling.temperature", "is nan"),
        (set_sampling(temperature=1e-6), "sampling.temperature", "0 (greedy)"),
        (set_sampling(top_p=0.0), "sampling.top_p", "is 0"),
        (set_sampling(top_p=1.5), "sampling.top_p", "is 1.5"),
        (set_sampling(stop_token_ids=[3, 9999]), "sampling.stop_token_ids[1]", "9999"),
    ],
)
def test_bad_requests_name_the_field(
    stub: policy_pb2_grpc.PolicyServiceStub,
    spoil: Callable[[policy_pb2.GenerateRequest], None],
    field: str,
    sentence: str,
) -> None:
    request = a_request()
    spoil(request)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request))
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.field == field
    assert sentence in error.message


def test_another_tokenizer_is_refused(client: PolicyClient) -> None:
    own = client.get_policy().tokenizer_sha256
    sampling = Sampling(seed=0, max_new_tokens=2)
    assert len(list(client.generate(prompts_of(1), sampling, tokenizer_sha256=own))) == 1
    with pytest.raises(PreconditionFailed, match="f00d") as caught:
        list(client.generate(prompts_of(1), sampling, tokenizer_sha256="f00d"))
    assert caught.value.reason == "TOKENIZER_MISMATCH"
    assert caught.value.metadata == {"requested": "f00d", "served": own}


def test_older_weights_than_required_are_refused(client: PolicyClient) -> None:
    """ppo.md row 35: refused, never answered with stale weights."""
    with pytest.raises(PreconditionFailed, match="version 1 is required and version 0") as caught:
        list(client.generate(prompts_of(1), Sampling(0, 2), min_weights_version=1))
    assert caught.value.reason == "WEIGHTS_TOO_OLD"
    assert caught.value.metadata == {"requested": "1", "served": "0"}


def test_the_models_own_end_stops_where_none_is_given(
    client: PolicyClient, service: PolicyService
) -> None:
    model = service.engine.frozen.model
    found = client.generate(prompts_of(40), Sampling(seed=11, max_new_tokens=60))
    stopped = [its for its in found if its.finish_reason == "stop"]
    assert stopped
    assert {int(its.ids[-1]) for its in stopped} == {model.config.eos_token_id}


def test_a_custom_stop_id_replaces_it(client: PolicyClient) -> None:
    sampling = Sampling(seed=11, max_new_tokens=60, stop_token_ids=tuple(range(50, 70)))
    found = list(client.generate(prompts_of(40), sampling))
    assert {its.finish_reason for its in found} == {"stop", "length"}
    for its in found:
        assert (50 <= its.ids[-1] < 70) == (its.finish_reason == "stop")
        assert not ((its.ids[:-1] >= 50) & (its.ids[:-1] < 70)).any()


def test_broken_weights_are_an_error_and_not_numbers(
    client: PolicyClient, service: PolicyService
) -> None:
    prompts, sampling = prompts_of(12), Sampling(seed=0, max_new_tokens=6)
    expected = by_key(client.generate(prompts, sampling))
    norm = service.engine.frozen.model.model.norm.weight
    kept = norm.clone()
    loop = service.engine.loop
    loop.run(lambda: norm.fill_(torch.nan)).result()
    with pytest.raises(InternalError, match="not finite from weights version 0") as caught:
        list(client.generate(prompts, sampling))
    assert caught.value.reason == "NON_FINITE"
    loop.run(lambda: norm.copy_(kept)).result()
    found = by_key(client.generate(prompts, sampling))
    assert {key: its.ids.tolist() for key, its in found.items()} == {
        key: its.ids.tolist() for key, its in expected.items()
    }


def test_a_failing_step_fails_its_requests_alone(
    client: PolicyClient, service: PolicyService
) -> None:
    model = service.engine.frozen.model
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(InternalError, match="internal error in"):
        list(client.generate(prompts_of(3), Sampling(seed=0, max_new_tokens=6)))
    handle.remove()
    assert len(list(client.generate(prompts_of(3), Sampling(seed=0, max_new_tokens=6)))) == 3


def test_stop_finishes_what_runs_and_refuses_the_rest(tiny_folder: Path) -> None:
    policy = LocalPolicy.load(PolicyConfig(model=tiny_folder, limits=LIMITS))
    sampling = Sampling(seed=0, max_new_tokens=CONTEXT, stop_token_ids=RARE)
    arrivals = policy.generate(prompts_of(4), sampling)
    next(arrivals)
    policy.close()
    assert len(list(arrivals)) == 3
    with pytest.raises(ServiceError, match="stopping"):
        next(policy.generate(prompts_of(1), sampling))


def test_a_model_that_cannot_be_served_fails_the_start(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        PolicyService(PolicyConfig(model=tmp_path / "absent")).load()
    limits = PolicyLimits(max_item_tokens=4096)
    with pytest.raises(ModelError, match="max_item_tokens is 4096"):
        PolicyService(PolicyConfig(model=tiny_folder, limits=limits)).load()
