"""The reward service over real gRPC, compared with transformers' own classifier."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import prometheus_client
import pytest
import torch
import transformers

from kleash.base.version import software_version
from kleash.client.calls import ItemError
from kleash.client.reward import RewardClient
from kleash.common.v1 import common_pb2
from kleash.lm.digest import chat_template_sha256, model_digest, tokenizer_sha256
from kleash.lm.load import load_sequence_classifier, load_tokenizer, save_checkpoint_folder
from kleash.lm.sequences import TokenSequence
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.errors import InvalidRequest, from_rpc_error
from kleash.rpc.requests import Limits
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

MEAN, STD = 0.25, 2.0  # of tiny_reward_folder
MAX_ITEM_TOKENS = 200
LIMITS = Limits(
    max_items=64,
    max_item_tokens=MAX_ITEM_TOKENS,
    max_batch_tokens=512,
    max_queued_tokens=40_000,
    max_message_bytes=200_000,
)
CONVERSATION = [
    {"role": "user", "content": "What is 3 plus 4?"},
    {"role": "assistant", "content": "3 plus 4 is 7."},
]
RENDERED = "<|user|>What is 3 plus 4?<|assistant|>3 plus 4 is 7.<|end|>"


@pytest.fixture(scope="module")
def server(tiny_reward_folder: Path) -> Iterator[BackgroundServer]:
    service = RewardService(RewardConfig(model=tiny_reward_folder, limits=LIMITS))
    with BackgroundServer([service], ServerConfig()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[RewardClient]:
    with RewardClient(server.address) as client:
        yield client


@pytest.fixture
def stub(server: BackgroundServer) -> Iterator[reward_pb2_grpc.RewardServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield reward_pb2_grpc.RewardServiceStub(channel)


@pytest.fixture(scope="module")
def tokenizer(tiny_reward_folder: Path) -> Any:
    return load_tokenizer(tiny_reward_folder)


@pytest.fixture(scope="module")
def digest(tokenizer: Any) -> str:
    return tokenizer_sha256(tokenizer)


@pytest.fixture(scope="module")
def theirs(tiny_reward_folder: Path) -> Any:
    """Plain transformers, as any other user would load the folder."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_reward_folder)
    return model.eval()


def raw_score(model: Any, ids: np.ndarray) -> float:
    """transformers' own answer for one row alone."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits.item()


def random_sequences(count: int, *, seed: int, longest: int = 90) -> list[TokenSequence]:
    random = np.random.default_rng(seed)
    return [
        TokenSequence(random.integers(5, 300, length).astype(np.int32), 1)
        for length in random.integers(1, longest, count)
    ]


def token_item(ids: Any, digest: str, item_id: str = "") -> reward_pb2.ScoreItem:
    raw = np.asarray(ids, dtype="<i4")
    return reward_pb2.ScoreItem(
        item_id=item_id,
        tokens=common_pb2.TokenSequence(
            tokens=common_pb2.TokenIds(ids_i32=raw.tobytes(), count=len(raw)),
            tokenizer_sha256=digest,
        ),
    )


def refusal(call: Any, request: Any) -> Any:
    """The typed error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return from_rpc_error(caught.value)


def metric(name: str, **labels: str) -> float:
    return prometheus_client.REGISTRY.get_sample_value(name, labels) or 0.0


def test_get_model_tells_what_is_served(
    client: RewardClient, tiny_reward_folder: Path, tokenizer: Any
) -> None:
    answer = client.get_model()
    assert answer.model.name == "llama-reward"
    assert answer.model.revision == model_digest(load_sequence_classifier(tiny_reward_folder))
    assert answer.tokenizer_sha256 == tokenizer_sha256(tokenizer)
    assert answer.chat_template_sha256 == chat_template_sha256(tokenizer) != ""
    assert (answer.dtype, answer.supports_token_scores) == ("float32", True)
    assert (answer.normalization_mean, answer.normalization_std) == (MEAN, STD)
    assert answer.server_version == software_version()
    assert answer.limits == LIMITS.to_message(MAX_ITEM_TOKENS)


def test_conversation_text_and_tokens_are_one_input(
    client: RewardClient, tokenizer: Any, digest: str, theirs: Any
) -> None:
    """Checklist R3, R4: transformers' classifier on the rendered template is the expected value."""
    ids = np.array(tokenizer.encode(RENDERED, add_special_tokens=False), dtype=np.int32)
    assert ids[-1] == tokenizer.eos_token_id
    expected = raw_score(theirs, ids)
    scores = [
        *client.score_conversations([CONVERSATION], normalize=False),
        *client.score_texts([RENDERED], normalize=False),
        *client.score_tokens([TokenSequence(ids, 5)], tokenizer_sha256=digest, normalize=False),
    ]
    assert [score.token_count for score in scores] == [len(ids)] * 3
    assert scores[0].score == scores[1].score == scores[2].score
    assert scores[0].score == pytest.approx(expected, abs=1e-5)
    normalized = client.score_texts([RENDERED], normalize=True)[0].score
    assert normalized == pytest.approx((expected - MEAN) / STD, abs=1e-5)


def test_order_is_kept_with_mixed_lengths_and_splitting(
    client: RewardClient, digest: str, theirs: Any
) -> None:
    """150 items need three calls of at most 64, computed in batches sorted by length."""
    sequences = random_sequences(150, seed=1)
    scores = client.score_tokens(sequences, tokenizer_sha256=digest, normalize=False)
    assert [score.index for score in scores] == list(range(150))
    assert [score.token_count for score in scores] == [len(s.ids) for s in sequences]
    expected = [raw_score(theirs, s.ids) for s in sequences]
    np.testing.assert_allclose([score.score for score in scores], expected, atol=1e-5)
    assert np.ptp(expected) > 0.1


def test_token_scores_are_scores_of_prefixes(
    client: RewardClient, digest: str, theirs: Any
) -> None:
    sequences = random_sequences(3, seed=2, longest=12)
    for score, sequence in zip(
        client.score_tokens(
            sequences, tokenizer_sha256=digest, normalize=True, return_token_scores=True
        ),
        sequences,
        strict=True,
    ):
        prefixes = [raw_score(theirs, sequence.ids[: n + 1]) for n in range(len(sequence.ids))]
        assert score.token_scores is not None
        np.testing.assert_allclose(score.token_scores, (np.array(prefixes) - MEAN) / STD, atol=1e-5)
        assert score.token_scores[-1] == np.float32(score.score)


def test_one_bad_item_never_sinks_the_others(
    stub: reward_pb2_grpc.RewardServiceStub, digest: str, theirs: Any
) -> None:
    good = random_sequences(2, seed=3)
    vocab_size = theirs.config.vocab_size
    empty = common_pb2.Conversation()
    request = reward_pb2.ScoreRequest(
        items=[
            token_item(good[0].ids, digest, "first"),
            token_item(np.full(MAX_ITEM_TOKENS + 1, 7), digest, "long"),
            token_item([5, vocab_size, 6], digest, "beyond"),
            token_item([5, -1], digest, "negative"),
            token_item([], digest, "no tokens"),
            reward_pb2.ScoreItem(item_id="no text", text=""),
            reward_pb2.ScoreItem(item_id="no turns", conversation=empty),
            token_item(good[1].ids, digest, "last"),
        ]
    )
    response = stub.Score(request)
    results = {result.item_id: result for result in response.results}
    assert list(results) == [item.item_id for item in request.items]
    for name, sequence in (("first", good[0]), ("last", good[1])):
        assert results[name].code == common_pb2.ITEM_STATUS_CODE_OK
        assert results[name].score == pytest.approx(raw_score(theirs, sequence.ids), abs=1e-5)
    long = results["long"]
    assert long.code == common_pb2.ITEM_STATUS_CODE_INPUT_TOO_LONG
    assert "201 tokens" in long.error_message
    assert "200" in long.error_message
    for name, cause in {
        "beyond": f"token id {vocab_size} at position 1",
        "negative": "token id -1 at position 1",
        "no tokens": "no tokens",
        "no text": "no tokens",
        "no turns": "no messages",
    }.items():
        assert results[name].code == common_pb2.ITEM_STATUS_CODE_INVALID_INPUT
        assert cause in results[name].error_message
        assert not results[name].HasField("token_scores")


def test_usage_and_model_are_in_the_reply(
    stub: reward_pb2_grpc.RewardServiceStub, client: RewardClient
) -> None:
    before = metric("kleash_items_total", service="reward", status="OK")
    response = stub.Score(reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(text=RENDERED)] * 3))
    answered = metric("kleash_items_total", service="reward", status="OK") - before
    assert answered == 3
    usage = response.usage
    assert usage.tokens == sum(result.token_count for result in response.results) > 0
    assert usage.tokenize_ns > 0
    assert usage.compute_ns > 0
    assert response.model == client.get_model().model


def test_item_errors_are_raised_or_returned(client: RewardClient, digest: str) -> None:
    sequences = [*random_sequences(2, seed=4), TokenSequence(np.full(201, 7, np.int32), 1)]
    with pytest.raises(ItemError, match=r"item 2 .*INPUT_TOO_LONG.*201 tokens") as caught:
        client.score_tokens(sequences, tokenizer_sha256=digest)
    assert caught.value.index == 2
    scores = client.score_tokens(sequences, tokenizer_sha256=digest, raise_on_item_error=False)
    assert [score.code for score in scores] == ["OK", "OK", "INPUT_TOO_LONG"]
    with pytest.raises(ItemError, match="item 2"):
        _ = scores[2].score


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_other_side(
    client: RewardClient, digest: str, theirs: Any, side: Any
) -> None:
    long = random_sequences(1, seed=5)[0].ids.repeat(300)[:230]
    long[:30], long[-30:] = 11, 12
    kept = long[-MAX_ITEM_TOKENS:] if side == "left" else long[:MAX_ITEM_TOKENS]
    [score] = client.score_tokens(
        [TokenSequence(long, 1)], tokenizer_sha256=digest, truncation=side, normalize=False
    )
    assert (score.is_truncated, score.token_count) == (True, MAX_ITEM_TOKENS)
    assert score.score == pytest.approx(raw_score(theirs, kept), abs=1e-5)
    [short] = client.score_tokens(
        [TokenSequence(long[:9], 1)], tokenizer_sha256=digest, truncation=side
    )
    assert not short.is_truncated


def test_non_finite_scores_never_leave(
    tiny_reward_folder: Path, tmp_path: Path, digest: str
) -> None:
    """A model with a NaN in its head answers with a status, and the client raises."""
    model = load_sequence_classifier(tiny_reward_folder)
    with torch.no_grad():
        model.score.weight[0, 3] = math.nan
    save_checkpoint_folder(model, load_tokenizer(tiny_reward_folder), tmp_path / "nan", {})
    service = RewardService(RewardConfig(model=tmp_path / "nan"))
    with (
        BackgroundServer([service], ServerConfig()) as server,
        RewardClient(server.address) as client,
    ):
        [score] = client.score_texts(["hello"], return_token_scores=True, raise_on_item_error=False)
        assert (score.code, score.value, score.token_scores) == ("NON_FINITE", 0.0, None)
        with pytest.raises(ItemError, match=r"item 0 has no result .NON_FINITE.: .*NaN"):
            client.score_tokens(random_sequences(1, seed=6), tokenizer_sha256=digest)


def test_compare_ranks_and_gives_bradley_terry_odds(
    client: RewardClient, stub: reward_pb2_grpc.RewardServiceStub
) -> None:
    """preference = sigmoid(best - each) of raw scores, whatever ``normalize`` is."""
    responses = ["3 plus 4 is 7.", "12 is bigger.", "the lazy dog", "hello"]
    conversations = [[CONVERSATION[0], {"role": "assistant", "content": r}] for r in responses]
    raw = np.array([s.score for s in client.score_conversations(conversations, normalize=False)])
    for normalize in (False, True):
        answer = client.compare(CONVERSATION[0]["content"], responses, normalize=normalize)
        assert answer.ranking == list(np.argsort(-raw))
        np.testing.assert_allclose(answer.preference, 1 / (1 + np.exp(raw - raw.max())), atol=1e-5)
        expected = (raw - MEAN) / STD if normalize else raw
        np.testing.assert_allclose([s.score for s in answer.scores], expected, atol=1e-5)
    assert min(answer.preference) == pytest.approx(0.5)
    assert max(answer.preference) > 0.5001


def test_compare_leaves_out_a_failed_candidate_and_refuses_too_few(client: RewardClient) -> None:
    answer = client.compare(CONVERSATION[:1], ["fine", "y " * 400, "good"])
    assert answer.scores[1].code == "INPUT_TOO_LONG"
    assert sorted(answer.ranking) == [0, 2]
    assert answer.preference[1] == 0
    with pytest.raises(InvalidRequest, match="at least two") as caught:
        client.compare("hello", ["only one"])
    assert caught.value.field == "responses"
    with pytest.raises(InvalidRequest) as caught:
        client.compare([], ["a", "b"])
    assert caught.value.field == "prompt.messages"


def test_count_tokens_is_before_truncation(client: RewardClient, tokenizer: Any) -> None:
    long = "fox " * 300
    counts = client.count_tokens([RENDERED, CONVERSATION, long])
    ids = tokenizer.encode(RENDERED, add_special_tokens=False)
    assert counts == [len(ids), len(ids), len(tokenizer.encode(long))]
    with pytest.raises(InvalidRequest, match="no tokens") as caught:
        client.count_tokens(["hello", ""])
    assert caught.value.field == "items[1]"


def test_concurrent_callers_get_their_own_answers(
    client: RewardClient, digest: str, theirs: Any
) -> None:
    batches = [random_sequences(9, seed=100 + n) for n in range(24)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(
                lambda b: client.score_tokens(b, tokenizer_sha256=digest, normalize=False), batches
            )
        )
    for batch, scores in zip(batches, answers, strict=True):
        expected = [raw_score(theirs, sequence.ids) for sequence in batch]
        np.testing.assert_allclose([s.score for s in scores], expected, atol=1e-5)


def test_empty_list_asks_nothing(client: RewardClient, digest: str) -> None:
    assert client.score_tokens([], tokenizer_sha256=digest) == []
    assert client.count_tokens([]) == []
