"""The reference service over real gRPC, compared with transformers' own log_softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import transformers

from kleash.base.errors import ModelError
from kleash.base.version import software_version
from kleash.client.calls import ItemError
from kleash.client.reference import ReferenceClient
from kleash.common.v1 import common_pb2
from kleash.lm.digest import chat_template_sha256, model_digest, tokenizer_sha256
from kleash.lm.load import load_causal_lm, load_tokenizer, save_checkpoint_folder
from kleash.lm.sequences import TokenSequence
from kleash.lm.tiny import Kind
from kleash.reference.config import ReferenceConfig, ReferenceLimits
from kleash.reference.local import LocalReference
from kleash.reference.service import ReferenceService
from kleash.reference.v1 import reference_pb2, reference_pb2_grpc
from kleash.rpc.codec import decode_floats
from kleash.rpc.errors import InvalidRequest, PreconditionFailed, from_rpc_error
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

MAX_ITEM_TOKENS = 100
LIMITS = ReferenceLimits(max_items=32, max_item_tokens=MAX_ITEM_TOKENS, max_batch_tokens=256)


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[BackgroundServer]:
    service = ReferenceService(ReferenceConfig(model=tiny_folder, limits=LIMITS))
    with BackgroundServer([service], ServerConfig()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[ReferenceClient]:
    with ReferenceClient(server.address) as client:
        yield client


@pytest.fixture
def stub(server: BackgroundServer) -> Iterator[reference_pb2_grpc.ReferenceServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield reference_pb2_grpc.ReferenceServiceStub(channel)


@pytest.fixture(scope="module")
def digest(tiny_folder: Path) -> str:
    return tokenizer_sha256(load_tokenizer(tiny_folder))


def plain_transformers(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def expected(model: Any, sequence: TokenSequence, temperature: float) -> np.ndarray:
    """torch's log_softmax of transformers' logits / T, in float64, for one row alone."""
    ids = torch.from_numpy(sequence.ids.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double() / temperature
    log_probs = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).squeeze(1).numpy()
    return log_probs[sequence.response_start - 1 :]


def random_sequences(count: int, *, seed: int) -> list[TokenSequence]:
    """Mixed lengths, mixed borders, some with an empty response."""
    random = np.random.default_rng(seed)
    sequences = []
    for length in random.integers(1, 60, count):
        ids = random.integers(5, 300, length).astype(np.int32)
        sequences.append(TokenSequence(ids, int(random.integers(1, length + 1))))
    return sequences


def item(ids: Any, digest: str, response_start: int = 1) -> reference_pb2.LogProbsItem:
    raw = np.asarray(ids, dtype="<i4")
    return reference_pb2.LogProbsItem(
        item_id=f"{len(raw)} tokens",
        tokens=common_pb2.TokenSequence(
            tokens=common_pb2.TokenIds(ids_i32=raw.tobytes(), count=len(raw)),
            response_start=response_start,
            tokenizer_sha256=digest,
        ),
    )


def refusal(call: Any, request: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_equal_transformers(
    client: ReferenceClient, tiny_folder: Path, digest: str, temperature: float
) -> None:
    """facts/ppo.md section 4, rows 1-5: 80 mixed items in three calls, answered in order."""
    sequences = random_sequences(80, seed=1)
    model = plain_transformers(tiny_folder)
    answers = client.log_probs(sequences, temperature=temperature, tokenizer_sha256=digest)
    for answer, sequence in zip(answers, sequences, strict=True):
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer, expected(model, sequence, temperature), atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_other_model_families(tiny_folders: dict[Kind, Path], kind: Kind) -> None:
    local = LocalReference.load(ReferenceConfig(model=tiny_folders[kind], limits=LIMITS))
    sequences = random_sequences(20, seed=2)
    answers = local.log_probs(
        sequences, temperature=0.7, tokenizer_sha256=local.get_model().tokenizer_sha256
    )
    model = plain_transformers(tiny_folders[kind])
    for answer, sequence in zip(answers, sequences, strict=True):
        np.testing.assert_allclose(answer, expected(model, sequence, 0.7), atol=1e-5)


def test_temperature_matters(client: ReferenceClient, digest: str) -> None:
    """Row 3: scoring at the wrong temperature is far outside of the tolerance above."""
    sequences = random_sequences(5, seed=3)
    hot, cold = (
        np.concatenate(client.log_probs(sequences, temperature=t, tokenizer_sha256=digest))
        for t in (1.0, 0.7)
    )
    assert np.abs(hot - cold).max() > 1e-2


def test_temperature_on_the_wire(
    stub: reference_pb2_grpc.ReferenceServiceStub, client: ReferenceClient, digest: str
) -> None:
    """Absent is 1; 0 and everything else that is not positive is refused."""
    [sequence] = random_sequences(1, seed=4)
    items = [item(sequence.ids, digest, sequence.response_start)]
    [result] = stub.LogProbs(reference_pb2.LogProbsRequest(items=items)).results
    [answer] = client.log_probs([sequence], temperature=1.0, tokenizer_sha256=digest)
    np.testing.assert_array_equal(decode_floats(result.log_probs, field=""), answer)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        request = reference_pb2.LogProbsRequest(items=items, temperature=temperature)
        error = refusal(stub.LogProbs, request)
        assert (type(error), error.field) == (InvalidRequest, "temperature")


def test_mixed_temperatures_in_one_batch(tiny_folder: Path, server: BackgroundServer) -> None:
    """Callers with different temperatures share the queue and keep their own."""
    digest = tokenizer_sha256(load_tokenizer(tiny_folder))
    sequences = random_sequences(10, seed=5)
    model = plain_transformers(tiny_folder)
    temperatures = [0.5, 0.7, 1.0, 1.3] * 4
    with ReferenceClient(server.address) as client, ThreadPoolExecutor(8) as threads:
        answers = threads.map(
            lambda t: client.log_probs(sequences, temperature=t, tokenizer_sha256=digest),
            temperatures,
        )
        for temperature, rows in zip(temperatures, answers, strict=True):
            for row, sequence in zip(rows, sequences, strict=True):
                np.testing.assert_allclose(row, expected(model, sequence, temperature), atol=1e-5)


def test_empty_response_gives_an_empty_list(client: ReferenceClient, digest: str) -> None:
    empty = TokenSequence(np.array([5, 6, 7], dtype=np.int32), 3)
    one = TokenSequence(np.array([5, 6, 7], dtype=np.int32), 2)
    answers = client.log_probs([empty, one], temperature=1.0, tokenizer_sha256=digest)
    assert [answer.shape for answer in answers] == [(0,), (1,)]


def test_one_bad_item_never_sinks_the_others(
    stub: reference_pb2_grpc.ReferenceServiceStub, tiny_folder: Path, digest: str
) -> None:
    vocab_size = plain_transformers(tiny_folder).config.vocab_size
    rows = [[5, 6, 7], [7] * (MAX_ITEM_TOKENS + 1), [5, vocab_size], [-1, 5], [5, 6, 7]]
    response = stub.LogProbs(
        reference_pb2.LogProbsRequest(items=[item(ids, digest) for ids in rows])
    )
    codes = [common_pb2.ItemStatusCode.Name(r.code).split("CODE_")[1] for r in response.results]
    assert codes == ["OK", "INPUT_TOO_LONG", "INVALID_INPUT", "INVALID_INPUT", "OK"]
    assert [r.item_id for r in response.results] == [f"{len(ids)} tokens" for ids in rows]
    assert "101 tokens" in response.results[1].error_message
    assert f"token id {vocab_size} at position 1" in response.results[2].error_message
    assert "token id -1 at position 0" in response.results[3].error_message
    assert response.results[0].log_probs == response.results[4].log_probs
    assert response.results[0].log_probs.count == 2
    assert response.usage.tokens == 6
    assert response.usage.compute_ns > 0
    assert response.model.revision.startswith("sha256:")


def test_client_raises_for_a_bad_item(client: ReferenceClient, digest: str) -> None:
    long = TokenSequence(np.full(101, 7, dtype=np.int32), 1)
    with pytest.raises(ItemError, match=r"item 40 .*INPUT_TOO_LONG.*101 tokens"):
        client.log_probs(
            [*random_sequences(40, seed=6), long], temperature=1.0, tokenizer_sha256=digest
        )


def test_malformed_requests_name_their_place(
    stub: reference_pb2_grpc.ReferenceServiceStub, digest: str
) -> None:
    good, odd = item([5, 6], digest), item([5, 6], digest)
    odd.tokens.tokens.count = 1
    cases = [
        ([good, odd], "items[1].tokens.tokens.ids_i32"),
        ([item([5, 6], digest, response_start=0)], "items[0].tokens.response_start"),
        ([item([5, 6], digest, response_start=3)], "items[0].tokens.response_start"),
        ([item([5, 6], "")], "items[0].tokens.tokenizer_sha256"),
        ([good] * 33, "items"),
    ]
    for items, field in cases:
        error = refusal(stub.LogProbs, reference_pb2.LogProbsRequest(items=items))
        assert (type(error), error.field) == (InvalidRequest, field)


def test_another_tokenizer_is_refused(client: ReferenceClient, digest: str) -> None:
    with pytest.raises(PreconditionFailed) as caught:
        client.log_probs(random_sequences(1, seed=7), temperature=1.0, tokenizer_sha256="cd" * 32)
    assert caught.value.reason == "TOKENIZER_MISMATCH"
    assert caught.value.metadata == {"requested": "cd" * 32, "served": digest}


def test_get_model_tells_what_is_served(client: ReferenceClient, tiny_folder: Path) -> None:
    answer = client.get_model()
    model, tokenizer = load_causal_lm(tiny_folder), load_tokenizer(tiny_folder)
    assert (answer.model.name, answer.model.revision) == ("llama", model_digest(model))
    assert answer.tokenizer_sha256 == tokenizer_sha256(tokenizer)
    assert answer.chat_template_sha256 == chat_template_sha256(tokenizer)
    assert (answer.dtype, answer.vocab_size) == ("float32", model.config.vocab_size)
    assert answer.limits == LIMITS.to_message(MAX_ITEM_TOKENS)
    assert answer.server_version == software_version()


def test_non_finite_log_probs_never_leave(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_causal_lm(tiny_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = math.inf
    save_checkpoint_folder(model, load_tokenizer(tiny_folder), tmp_path / "inf", {})
    local = LocalReference.load(ReferenceConfig(model=tmp_path / "inf"))
    bad = TokenSequence(np.array([5, 9, 6], dtype=np.int32), 1)
    with pytest.raises(ItemError, match=r"item 0 .*NON_FINITE.*response token 0 is"):
        local.log_probs([bad], temperature=1.0, tokenizer_sha256=local.get_model().tokenizer_sha256)


def test_limits_that_cannot_hold_are_refused_at_start(tiny_folder: Path) -> None:
    config = ReferenceConfig(model=tiny_folder, limits=ReferenceLimits(max_item_tokens=300))
    with pytest.raises(ModelError, match=r"max_item_tokens is 300 and can be at most 256"):
        LocalReference.load(config)
    with pytest.raises(ValueError, match="less than max_batch_tokens"):
        ReferenceLimits(max_queued_tokens=100)
    partial = ReferenceConfig.model_validate({"model": "x", "limits": {"max_items": 5}})
    assert partial.limits.max_batch_tokens == ReferenceLimits().max_batch_tokens
