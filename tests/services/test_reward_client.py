"""What the reward client does beyond one call: models, options, limits, waits, the environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.services.scripted_reward import ScriptedReward, serving

from kleash.base.errors import ConfigError
from kleash.client import (
    DeadlineExceeded,
    InvalidRequest,
    ItemError,
    NotFound,
    Overloaded,
    RewardClient,
)
from kleash.client.calls import Patience
from kleash.reward.v1 import reward_pb2

pytestmark = pytest.mark.services


@pytest.fixture
def service() -> ScriptedReward:
    return ScriptedReward()


@pytest.fixture
def address(service: ScriptedReward) -> Iterator[str]:
    with serving(service) as server:
        yield server.address


@pytest.fixture
def client(address: str) -> Iterator[RewardClient]:
    with RewardClient(address, timeout_s=20) as client:
        yield client


def busy(retry_after_s: float | None, count: int) -> list[Overloaded]:
    return [Overloaded("busy.", retry_after_s=retry_after_s)] * count


def test_models_are_listed_the_default_first(client: RewardClient) -> None:
    assert [model.name for model in client.list_models()] == ["kind", "honest"]


def test_every_call_names_the_model_and_the_revision(service: ScriptedReward, address: str) -> None:
    with RewardClient(address, model="honest", revision="sha256:1") as client:
        [score] = client.score_texts(["abc"])
        assert (score.model, score.revision) == ("honest", "sha256:1")
        client.compare("q", ["a", "b"])
        client.count_tokens(["abc"])
        [streamed] = client.score_stream(["abc"])
        assert streamed.model == client.get_model().model.name == "honest"
    assert len(service.requests) == 6
    assert {(each.model, each.revision) for each in service.requests} == {("honest", "sha256:1")}
    with RewardClient(address, model="other") as client, pytest.raises(NotFound, match="other"):
        client.get_model()


def test_components_and_uncertainty_come_with_the_score(client: RewardClient) -> None:
    scores = [*client.score_texts(["abcd"]), *client.score_stream(["abcd"])]
    assert len(scores) == 2
    for score in scores:
        assert score.components == {"long": 4.0, "half": 2.0}
        assert list(score.components) == ["long", "half"]
        assert score.uncertainty == 0.25


def test_texts_and_conversations_go_together(client: RewardClient) -> None:
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]
    scores = client.score(["x", turns, "yy", turns, "zzz"])
    assert [score.score for score in scores] == [1, 5, 2, 5, 3]


def test_options_of_one_call(service: ScriptedReward, client: RewardClient) -> None:
    """A second client of the same connection; the limits are asked for once."""
    other = client.with_options(model="honest", revision="sha256:1")
    assert other.score_texts(["a"])[0].model == "honest"
    assert client.score_texts(["a"])[0].model == "kind"
    assert client.with_options(timeout_s=9).score_texts(["a"])[0].model == "kind"
    assert len(service.asked(reward_pb2.GetModelRequest)) == 1
    with pytest.raises(TypeError, match="tiemout_s"):
        client.with_options(tiemout_s=1)  # type: ignore[call-arg]
    service.gate.clear()
    with pytest.raises(DeadlineExceeded):
        client.with_options(timeout_s=0.2).score_texts(["a"])


def test_an_unknown_keyword_is_an_error(client: RewardClient) -> None:
    with pytest.raises(TypeError, match="normalise"):
        client.score_texts(["a"], normalise=True)  # type: ignore[call-arg]


def test_a_list_is_split_to_the_limits(service: ScriptedReward, client: RewardClient) -> None:
    texts = ["x" * (n + 1) for n in range(10)]
    assert [score.score for score in client.score_texts(texts)] == list(range(1, 11))
    assert sorted(len(each.items) for each in service.asked(reward_pb2.ScoreRequest)) == [2, 4, 4]


def test_an_item_above_the_message_limit_fails_alone(
    service: ScriptedReward, client: RewardClient
) -> None:
    """It is not sent; those beside it are scored."""
    large = "y" * 8192
    scores = client.score_texts(["a", large, "bbb"], raise_on_item_error=False)
    assert [score.code for score in scores] == ["OK", "INPUT_TOO_LONG", "OK"]
    assert [scores[0].score, scores[2].score] == [1, 3]
    assert "8195 bytes" in scores[1].error_message
    assert max(each.ByteSize() for each in service.requests) < 1000
    with pytest.raises(ItemError, match=r"item 1 .*INPUT_TOO_LONG.*8195 bytes.*7168"):
        client.score_texts(["a", large])
    with pytest.raises(InvalidRequest, match="8195 bytes") as caught:
        client.count_tokens(["a", large])
    assert (caught.value.field, caught.value.reason) == ("items[1]", "TOO_LARGE")
    with pytest.raises(InvalidRequest, match=r"the comparison has .* bytes") as caught:
        client.compare("q", ["a", large])
    assert caught.value.field == "responses"
    stream = client.score_stream(["a", large])
    assert next(stream).score == 1
    with pytest.raises(InvalidRequest, match=r"input 1: .*8195 bytes"):
        next(stream)
    [alone] = client.score_texts([large], raise_on_item_error=False)
    assert alone.code == "INPUT_TOO_LONG"


def test_an_item_at_the_limit_is_sent(service: ScriptedReward, client: RewardClient) -> None:
    assert client.score_texts(["y" * (8192 - 1024 - 3)])[0].score == 8192 - 1024 - 3


def test_limits_that_have_shrunk_are_asked_for_again(
    service: ScriptedReward, client: RewardClient
) -> None:
    """A server that took the place of another has limits of its own."""
    assert len(client.score_texts(["a"] * 4)) == 4
    service.limits.max_items = 2
    assert len(client.score_texts(["a"] * 4)) == 4
    assert len(service.asked(reward_pb2.GetModelRequest)) == 2


def test_a_refusal_that_new_limits_do_not_explain_is_raised(
    service: ScriptedReward, client: RewardClient
) -> None:
    service.refusals = [InvalidRequest("no.", reason="TOO_LARGE", field="items")]
    with pytest.raises(InvalidRequest, match=r"^no\.$"):
        client.score_texts(["a"])
    assert len(service.asked(reward_pb2.ScoreRequest)) == 1


def test_a_busy_service_is_waited_for_beyond_the_retries_of_grpc(
    service: ScriptedReward, client: RewardClient
) -> None:
    service.refusals = list(busy(0.01, 12))
    assert client.score_texts(["abc"])[0].score == 3
    assert len(service.asked(reward_pb2.ScoreRequest)) == 13


def test_waiting_ends_where_it_was_told_to(service: ScriptedReward, client: RewardClient) -> None:
    """gRPC's own five attempts are not counted; without a time to retry there are none at all."""
    client.get_model()
    for max_wait_s, retry_after_s, num_attempts in ((0.0, 0.01, 5), (60.0, None, 1)):
        service.requests.clear()
        service.refusals = list(busy(retry_after_s, 12))
        with pytest.raises(Overloaded, match="busy"):
            client.with_options(max_wait_s=max_wait_s).score_texts(["abc"])
        assert len(service.asked(reward_pb2.ScoreRequest)) == num_attempts
        service.refusals.clear()


def test_patience_ends_before_the_deadline_and_with_its_budget() -> None:
    overload = Overloaded("busy.", retry_after_s=10.0)
    with pytest.raises(Overloaded):
        Patience(timeout_s=9.0, max_wait_s=60.0).pause_s(overload)
    with pytest.raises(InvalidRequest):
        Patience(timeout_s=60.0, max_wait_s=60.0).pause_s(InvalidRequest("no.", retry_after_s=0.1))
    patience = Patience(timeout_s=600.0, max_wait_s=25.0)
    assert all(10.0 <= patience.pause_s(overload) <= 12.0 for _ in range(2))
    with pytest.raises(Overloaded):
        patience.pause_s(overload)


@pytest.fixture
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "MODEL", "TIMEOUT_S"):
        monkeypatch.delenv(f"KLEASH_REWARD_{name}", raising=False)


@pytest.mark.usefixtures("_no_environment")
def test_from_env(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"KLEASH_REWARD_ADDRESS is not set; set it to"):
        RewardClient.from_env()
    monkeypatch.setenv("KLEASH_REWARD_ADDRESS", address)
    monkeypatch.setenv("KLEASH_REWARD_MODEL", "honest")
    monkeypatch.setenv("KLEASH_REWARD_TIMEOUT_S", "17.5")
    with RewardClient.from_env() as client:
        assert client.score_texts(["abc"])[0].model == "honest"
        assert client._options.timeout_s == 17.5
    with RewardClient.from_env(model="kind", timeout_s=3.0) as client:
        assert client.score_texts(["abc"])[0].model == "kind"
        assert client._options.timeout_s == 3.0
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("KLEASH_REWARD_TIMEOUT_S", text)
        with pytest.raises(ConfigError, match=f"KLEASH_REWARD_TIMEOUT_S={text} is not"):
            RewardClient.from_env()
    monkeypatch.setenv("KLEASH_REWARD_TIMEOUT_S", "")
    monkeypatch.delenv("KLEASH_REWARD_ADDRESS")
    with RewardClient.from_env(address=address) as client:
        assert client._options.timeout_s == 120.0
