"""A reward model that is another service's: what is passed on, and what happens when that fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.services.scripted_reward import NAMES, ScriptedReward, serving

from kleash.base.errors import ConfigError
from kleash.client.reward import RewardClient
from kleash.reward.config import RewardConfig
from kleash.reward.load import load_models
from kleash.reward.local import LocalReward
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    PreconditionFailed,
    Unauthenticated,
)
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services


class Behind(ScriptedReward):
    """A scripted service that tells its components, and notes how long callers wait."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seconds_left: list[float] = []

    async def GetModel(self, request: Any, context: Any) -> Any:
        answer = await super().GetModel(request, context)
        for name in ("long", "half"):
            answer.components.add(name=name, weight=1.0)
        return answer

    async def Score(self, request: Any, context: Any) -> Any:
        self.seconds_left.append(context.time_remaining())
        return await super().Score(request, context)


@pytest.fixture
def behind() -> Iterator[tuple[Behind, str]]:
    service = Behind()
    with serving(service) as server:
        yield service, server.address


@pytest.fixture
def far(behind: tuple[Behind, str]) -> Iterator[LocalReward]:
    local = LocalReward.load(RewardConfig(remote=behind[1], remote_model=NAMES[1]))
    yield local
    local.close()


def test_what_a_remote_model_tells_is_passed_on(
    behind: tuple[Behind, str], far: LocalReward
) -> None:
    scores = far.score_texts(["abcd", "bad", "ab"], raise_on_item_error=False)
    assert [(s.code, s.error_message) for s in scores] == [
        ("OK", ""),
        ("INVALID_INPUT", "it is bad."),
        ("OK", ""),
    ]
    assert scores[0].components == {"long": 4.0, "half": 2.0}
    assert (scores[0].uncertainty, scores[0].token_count) == (0.25, 4)
    asked = behind[0].asked(reward_pb2.ScoreRequest)
    assert {(each.model, each.revision) for each in asked} == {(NAMES[1], "sha256:1")}


@pytest.mark.parametrize(
    ("refusal", "raised", "reason"),
    [
        (Overloaded("no room.", reason="OUT_OF_MEMORY"), Overloaded, "OUT_OF_MEMORY"),
        (Unauthenticated("who?", reason="EXPIRED"), PreconditionFailed, "REMOTE_REFUSED"),
        (
            PermissionDenied("no.", reason="CALLER_NOT_ALLOWED"),
            PreconditionFailed,
            "REMOTE_REFUSED",
        ),
        (PreconditionFailed("no.", reason="X"), PreconditionFailed, "X"),
    ],
)
def test_errors_of_a_remote_service_are_passed_on(
    behind: tuple[Behind, str],
    far: LocalReward,
    refusal: Any,
    raised: type[Exception],
    reason: str,
) -> None:
    behind[0].refusals = [refusal]
    with pytest.raises(raised) as caught:
        far.score_texts(["a"])
    assert getattr(caught.value, "reason", "") == reason
    assert far.score_texts(["ab"])[0].score == 2.0


def test_the_time_to_retry_of_a_remote_service_is_passed_on(
    behind: tuple[Behind, str], far: LocalReward
) -> None:
    # gRPC tries five times, each after the time that it is told.
    busy = Overloaded("full.", reason="QUEUE_FULL", retry_after_s=0.03)
    behind[0].refusals = [busy] * 5
    with pytest.raises(Overloaded) as caught:
        far.score_texts(["a"])
    assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 0.03)


def test_an_item_that_a_remote_service_calls_invalid_fails_alone(
    behind: tuple[Behind, str], far: LocalReward
) -> None:
    fault = InvalidRequest("it cannot be read.", field="items[0]")
    behind[0].refusals = [fault, fault]
    got = far.score_texts(["a", "ab"], raise_on_item_error=False)
    assert [(each.code, each.value) for each in got] == [("INVALID_INPUT", 0.0), ("OK", 2.0)]
    assert got[0].error_message == "it cannot be read."


def test_smaller_limits_of_a_remote_service_are_learnt(
    behind: tuple[Behind, str], far: LocalReward
) -> None:
    behind[0].limits.max_items = 2
    assert [each.score for each in far.score_texts(["a", "ab", "abc"])] == [1.0, 2.0, 3.0]
    sizes = [len(each.items) for each in behind[0].asked(reward_pb2.ScoreRequest)]
    assert sizes[0] == 3
    assert max(sizes[1:]) == 2


def test_deadlines_are_passed_on_and_a_late_service_is_given_up(
    behind: tuple[Behind, str],
) -> None:
    service, address = behind
    config = RewardConfig(remote=address, remote_timeout_s=600)
    with (
        BackgroundServer([RewardService(config)], ServerConfig()) as server,
        RewardClient(server.address, timeout_s=30) as client,
    ):
        client.score_texts(["a"])
        assert 5 < service.seconds_left[-1] < 31
        service.gate.clear()
        with pytest.raises(DeadlineExceeded):
            client.with_options(timeout_s=0.5).score_texts(["ab"])
        assert service.seconds_left[-1] < 1
        service.gate.set()
        assert client.score_texts(["abc"])[0].score == 3.0


def test_a_remote_service_that_is_not_there_fails_the_start() -> None:
    with pytest.raises(ConfigError, match=r"model 'remote', a remote one: .*127\.0\.0\.1:9"):
        LocalReward.load(RewardConfig(remote="127.0.0.1:9", remote_timeout_s=0.2))


def test_a_revision_that_the_remote_service_lacks_fails_the_start(
    behind: tuple[Behind, str],
) -> None:
    config = RewardConfig(remote=behind[1], remote_revision="sha256:0", remote_timeout_s=5)
    with pytest.raises(ConfigError, match="sha256:0 is not served"):
        LocalReward.load(config)


def test_a_service_that_starts_later_is_waited_for() -> None:
    service = Behind()
    with serving(service) as server:
        address = server.address
    loaded: list[Any] = []
    config = RewardConfig(remote=address, remote_timeout_s=60)
    thread = threading.Thread(target=lambda: loaded.append(load_models(config)))
    thread.start()
    with serving(service, port=int(address.rpartition(":")[2])):
        thread.join()
        [models] = loaded
        assert models["remote"].facts.revision == "sha256:1"
        models["remote"].close()
