"""ScoreStream: large jobs over one call, paced by flow control."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from kleash.client.reward import RewardClient
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.errors import InvalidRequest, from_rpc_error
from kleash.rpc.requests import Limits
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def server(tiny_reward_folder: Path) -> Iterator[BackgroundServer]:
    config = RewardConfig(model=tiny_reward_folder, limits=Limits(max_batch_tokens=512))
    with BackgroundServer([RewardService(config)], ServerConfig()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: BackgroundServer) -> Iterator[RewardClient]:
    with RewardClient(server.address) as client:
        yield client


@pytest.fixture
def stub(server: BackgroundServer) -> Iterator[reward_pb2_grpc.RewardServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield reward_pb2_grpc.RewardServiceStub(channel)


def test_stream_answers_every_item(client: RewardClient) -> None:
    texts = [f"the quick brown fox {'jumps ' * (n % 17)}{n}" for n in range(50)]
    texts[20] = "x" * 4000
    scores = {score.index: score for score in client.score_stream(texts)}
    assert sorted(scores) == list(range(50))
    assert [n for n, score in scores.items() if not score.is_ok] == [20]
    assert scores[20].code == "INPUT_TOO_LONG"
    unary = client.score_texts(texts, raise_on_item_error=False)
    for n in set(range(50)) - {20}:
        assert scores[n].score == pytest.approx(unary[n].score, abs=1e-5)
    assert scores[0].revision == client.get_model().model.revision


def test_what_the_inputs_raise_is_raised_after_their_scores(client: RewardClient) -> None:
    def texts() -> Iterator[str]:
        yield from ("hello", "world")
        raise OSError("the disk of the inputs is gone.")

    stream = client.score_stream(texts())
    assert sorted((next(stream).index, next(stream).index)) == [0, 1]
    with pytest.raises(OSError, match="the disk of the inputs is gone"):
        next(stream)


def test_stream_ends_when_its_reader_stops(client: RewardClient) -> None:
    """The input is endless; the server is at rest again afterwards."""
    num_read = 0

    def texts() -> Iterator[str]:
        nonlocal num_read
        while True:
            num_read += 1
            yield "the quick brown fox"

    stream = client.score_stream(texts())
    assert all(next(stream).is_ok for _ in range(3))
    stream.close()
    assert client.score_texts(["hello"])[0].is_ok
    before = num_read
    assert client.score_texts(["hello"] * 50)[-1].is_ok
    assert num_read <= before + 1


def test_stream_is_paced_where_a_call_is_refused(tiny_reward_folder: Path) -> None:
    """A queue of 128 tokens takes a few of these items at a time; none is lost."""
    limits = Limits(max_batch_tokens=128, max_queued_tokens=128)
    service = RewardService(RewardConfig(model=tiny_reward_folder, limits=limits))
    texts = ["the quick brown fox jumps over the lazy dog"] * 60
    with (
        BackgroundServer([service], ServerConfig()) as server,
        RewardClient(server.address) as client,
    ):
        assert sorted(s.index for s in client.score_stream(texts) if s.is_ok) == list(range(60))


def test_stream_reads_options_once_and_ends_at_a_malformed_item(
    stub: reward_pb2_grpc.RewardServiceStub, client: RewardClient
) -> None:
    item = reward_pb2.ScoreItem(item_id="a", text="hello")
    first = reward_pb2.ScoreStreamRequest(item=item, options={"normalize": True})
    answers = list(stub.ScoreStream(iter([first, reward_pb2.ScoreStreamRequest(item=item)])))
    expected = client.score_texts(["hello"], normalize=True)[0].score
    assert [a.result.score for a in answers] == pytest.approx([expected] * 2, abs=1e-5)
    requests = iter([first, reward_pb2.ScoreStreamRequest()])
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.ScoreStream(requests))
    error = from_rpc_error(caught.value)
    assert (type(error), error.field) == (InvalidRequest, "item.input")
