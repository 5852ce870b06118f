"""AsyncRewardClient: the methods of RewardClient for asyncio, in one event loop with the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography import x509
from tests.services.authority import LOOPBACK, Authority
from tests.services.scripted_reward import ScriptedReward, serving

from kleash.base.errors import ConfigError
from kleash.client import (
    AsyncRewardClient,
    Cancelled,
    Credentials,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    RewardClient,
    Unauthenticated,
    Unavailable,
)
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2
from kleash.rpc import reloading
from kleash.rpc.background import background_loop
from kleash.rpc.server import BackgroundServer, ServerConfig
from kleash.rpc.static_tokens import make_token

pytestmark = pytest.mark.services

T = TypeVar("T")
CALL_S = 20.0


def run(work: Coroutine[Any, Any, T]) -> T:
    """In the event loop of the servers: gRPC wants one a process."""
    return asyncio.run_coroutine_threadsafe(work, background_loop()).result(60)


@pytest.fixture
def service() -> ScriptedReward:
    return ScriptedReward()


@pytest.fixture
def address(service: ScriptedReward) -> Iterator[str]:
    with serving(service) as server:
        yield server.address


async def until(condition: Any) -> None:
    async with asyncio.timeout(CALL_S):
        while not condition():  # noqa: ASYNC110, what it waits for is set by other loops, too
            await asyncio.sleep(0.005)


def test_it_answers_as_the_other_client_does(tiny_reward_folder: Path) -> None:
    """Every method, on a real model, with the same bits for an isolated call."""
    texts = [f"the quick brown fox {n}" for n in range(20)]
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    long = "x " * 3000
    service = RewardService(RewardConfig(model=tiny_reward_folder))

    async def ask(address: str) -> dict[str, Any]:
        async with AsyncRewardClient(address, timeout_s=CALL_S) as reward:
            compared = await reward.compare("hello", ["world", "dog"], isolate=True)
            return {
                "texts": await reward.score_texts(texts, isolate=True, normalize=False),
                "turns": await reward.score_conversations([turns], isolate=True),
                "mixed": await reward.score(["a", turns, long], raise_on_item_error=False),
                "counts": await reward.count_tokens(["hello", turns]),
                "model": await reward.pinned((await reward.get_model()).model.revision).get_model(),
                "models": await reward.list_models(),
                "empty": await reward.score_texts([]),
                "ranking": compared.ranking,
                "preference": compared.preference,
                "stream": sorted([s.index async for s in reward.score_stream(texts)]),
            }

    with (
        BackgroundServer([service], ServerConfig()) as server,
        RewardClient(server.address, timeout_s=CALL_S) as other,
    ):
        mine = run(ask(server.address))
        theirs = other.score_texts(texts, isolate=True, normalize=False)
        assert [s.score for s in mine["texts"]] == [s.score for s in theirs]
        [turned] = other.score_conversations([turns], isolate=True)
        assert mine["turns"][0].score == turned.score
        assert [s.code for s in mine["mixed"]] == ["OK", "OK", "INPUT_TOO_LONG"]
        assert mine["counts"] == other.count_tokens(["hello", turns])
        assert mine["model"] == other.get_model()
        assert mine["models"] == other.list_models()
        compared = other.compare("hello", ["world", "dog"], isolate=True)
        assert (mine["ranking"], mine["preference"]) == (compared.ranking, compared.preference)
        assert (mine["empty"], mine["stream"]) == ([], list(range(20)))


def test_it_has_the_methods_of_the_other_client() -> None:
    public = {name for name in dir(RewardClient) if not name.startswith("_")}
    assert public == {name for name in dir(AsyncRewardClient) if not name.startswith("_")}


def test_calls_of_one_list_are_at_most_parallel_calls(
    service: ScriptedReward, address: str
) -> None:
    async def ask(parallel_calls: int) -> list[float]:
        async with AsyncRewardClient(address, parallel_calls=parallel_calls) as reward:
            return [s.score for s in await reward.score_texts(["x" * n for n in range(1, 41)])]

    for parallel_calls in (1, 3):
        service.max_running = 0
        assert run(ask(parallel_calls)) == list(range(1, 41))
        assert service.max_running == parallel_calls


def test_a_cancelled_task_cancels_its_calls(service: ScriptedReward, address: str) -> None:
    async def ask() -> None:
        async with AsyncRewardClient(address, parallel_calls=3) as reward:
            await reward.get_model()
            service.gate.clear()
            task = asyncio.create_task(reward.score_texts(["a"] * 12))
            await until(lambda: service.num_running == 3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: service.num_cancelled == 3)
            assert service.num_running == 0
            service.gate.set()
            assert len(await reward.score_texts(["a"] * 5)) == 5

    run(ask())


def test_closing_is_no_cancellation_of_the_task(service: ScriptedReward, address: str) -> None:
    async def ask() -> None:
        reward = AsyncRewardClient(address)
        await reward.get_model()
        service.gate.clear()
        task = asyncio.create_task(reward.score_texts(["a"]))
        await until(lambda: service.num_running == 1)
        await reward.close()
        with pytest.raises(Cancelled, match="the client was closed"):
            await task
        with pytest.raises(ConfigError, match="this client is closed"):
            await reward.get_model()

    run(ask())


def test_errors_are_those_of_the_other_client(service: ScriptedReward, address: str) -> None:
    async def ask() -> None:
        async with AsyncRewardClient(address, timeout_s=CALL_S) as reward:
            service.refusals = [InvalidRequest("no.", field="items[0].text")]
            with pytest.raises(InvalidRequest, match=r"^no\.$") as caught:
                await reward.score_texts(["a"] * 12)
            assert caught.value.field == "items[0].text"
            service.gate.clear()
            with pytest.raises(DeadlineExceeded, match=address):
                await reward.with_options(timeout_s=0.2).score_texts(["a"])
            service.gate.set()
        async with AsyncRewardClient("127.0.0.1:1", timeout_s=CALL_S) as nobody:
            with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
                await nobody.get_model()

    run(ask())


def test_a_busy_service_is_waited_for(service: ScriptedReward, address: str) -> None:
    async def ask() -> None:
        async with AsyncRewardClient(address, timeout_s=CALL_S) as reward:
            service.refusals = [Overloaded("busy.", retry_after_s=0.01)] * 12
            assert (await reward.score_texts(["abc"]))[0].score == 3
            assert len(service.asked(reward_pb2.ScoreRequest)) == 13
            service.refusals = [Overloaded("busy.", retry_after_s=0.01)] * 12
            with pytest.raises(Overloaded):
                await reward.with_options(max_wait_s=0).score_texts(["abc"])
            service.refusals.clear()

    run(ask())


def test_limits_that_have_shrunk_are_asked_for_again(service: ScriptedReward, address: str) -> None:
    async def ask() -> None:
        async with AsyncRewardClient(address) as reward:
            assert len(await reward.score_texts(["a"] * 4)) == 4
            service.limits.max_items = 2
            assert len(await reward.score_texts(["a"] * 4)) == 4

    run(ask())


def test_a_stream_takes_asynchronous_inputs(service: ScriptedReward, address: str) -> None:
    async def texts() -> AsyncIterator[str]:
        for n in range(1, 6):
            await asyncio.sleep(0)
            yield "x" * n
        raise OSError("the disk of the inputs is gone.")

    async def ask() -> None:
        async with AsyncRewardClient(address, model="honest") as reward:
            stream = reward.score_stream(texts())
            scores = [await anext(stream) for _ in range(5)]
            with pytest.raises(OSError, match="the disk"):
                await anext(stream)
        assert [score.score for score in scores] == [1, 2, 3, 4, 5]
        assert {score.model for score in scores} == {"honest"}
        assert scores[4].components["half"] == 2.5

    run(ask())


def test_a_stream_ends_when_its_reader_stops(service: ScriptedReward, address: str) -> None:
    async def endless() -> AsyncIterator[str]:
        while True:
            yield "abc"

    async def ask() -> None:
        async with AsyncRewardClient(address) as reward:
            async with aclosing(reward.score_stream(endless())) as stream:
                assert [(await anext(stream)).score for _ in range(3)] == [3, 3, 3]
            await until(lambda: service.num_running == 0)
            before = len(service.requests)
            assert len(await reward.score_texts(["a"] * 8)) == 8
            assert len(service.requests) == before + 2

    run(ask())


def test_another_event_loop_is_told_apart(address: str) -> None:
    reward = AsyncRewardClient(address)
    run(reward.get_model())
    with pytest.raises(ConfigError, match="belongs to the event loop of its first call"):
        asyncio.run(reward.get_model())
    run(reward.close())


def test_a_new_token_is_shown_on_the_next_call(
    service: ScriptedReward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reloading, "CHECK_S", 0.0)
    keys, token_file = tmp_path / "keys", tmp_path / "token"
    (old, old_line), (new, new_line) = make_token("old"), make_token("new")
    keys.write_text(f"{old_line}\n{new_line}\n")
    token_file.write_text(old)

    async def ask(address: str) -> None:
        credentials = Credentials(token_file=token_file)
        async with AsyncRewardClient(address, credentials=credentials) as reward:
            await reward.get_model()
            token_file.write_text(new)
            await reward.get_model()
            assert [s.score async for s in reward.score_stream(["ab"])] == [2]
            token_file.write_text("wrong")
            with pytest.raises(Unauthenticated):
                await reward.get_model()

    with serving(service, auth={"mode": "token", "tokens_file": keys}) as server:
        run(ask(server.address))
    assert service.callers == ["old"] + ["new"] * 3


def test_a_new_certificate_is_used_by_the_next_call(
    service: ScriptedReward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call under way ends on the old connection, which is then closed."""
    monkeypatch.setattr(reloading, "CHECK_S", 0.0)
    authority = Authority(tmp_path)
    pair = authority.issue("server", *LOOPBACK)
    own = authority.issue("own", x509.DNSName("first"))
    following = authority.issue("following", x509.DNSName("second"))
    credentials = Credentials(ca=authority.ca, cert=own.cert, key=own.key)

    async def ask(address: str) -> None:
        async with AsyncRewardClient(address, credentials=credentials) as reward:
            await reward.get_model()
            service.gate.clear()
            running = asyncio.create_task(reward.score_texts(["abc"]))
            await until(lambda: service.num_running == 1)
            own.replace_by(following)
            await reward.get_model()
            assert service.callers == ["first"] * 3 + ["second"]
            assert len(reward._channel._retired) == 1
            service.gate.set()
            assert (await running)[0].score == 3
            assert not reward._channel._retired

    tls = {"cert": pair.cert, "key": pair.key, "client_ca": authority.ca}
    with serving(service, tls=tls, auth={"mode": "mtls"}) as server:
        run(ask(f"localhost:{server.port}"))


def test_from_env(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KLEASH_REWARD_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="KLEASH_REWARD_ADDRESS is not set"):
        AsyncRewardClient.from_env()
    monkeypatch.setenv("KLEASH_REWARD_ADDRESS", address)
    monkeypatch.setenv("KLEASH_REWARD_MODEL", "honest")

    async def ask() -> str:
        async with AsyncRewardClient.from_env() as reward:
            return (await reward.score_texts(["abc"]))[0].model

    assert run(ask()) == "honest"
