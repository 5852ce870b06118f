"""POST /get_reward, asked as OpenRLHF asks its remote reward URL.

``fetch_rewards_via_http`` and ``reward_of`` do what SingleTurnAgentExecutor does at
https://github.com/OpenRLHF/OpenRLHF/blob/3c3be6234e0cb353e76bb8019947db9dfe99fca7
(version 0.11.0), openrlhf/utils/agent.py:285-356: the keys of the body, aiohttp as the client and
its time limit, how the queries are divided among servers, five attempts, what is read of the reply.
Only the second between attempts is left out. ``tensors_of`` is what trainer/ppo_utils/
samples_generator.py:284-309 makes of that, and ``ask_as_before`` the client of versions up to 0.8
(openrlhf/utils/remote_rm_utils.py at tag v0.8.0). The server that is compared with is
openrlhf/cli/serve_rm.py of the same commit.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import requests
import torch
import transformers
from prometheus_client import REGISTRY
from tests.services.http_client import HttpPort, serving_reward

from kleash.common.v1 import common_pb2
from kleash.lm.load import load_tokenizer
from kleash.reward.http import write_get_reward
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.requests import Limits

pytestmark = pytest.mark.services

ATTEMPTS = 5
MEAN, STD = 0.25, 2.0  # of tiny_reward_folder
QUERIES = [
    "<|user|>What is 3 plus 4?<|assistant|>3 plus 4 is 7.<|end|>",
    "<|user|>Hello<|assistant|>Hi<|end|>",
    "no template at all",
]


@pytest.fixture(scope="module")
def port(tiny_reward_folder: Path) -> Iterator[HttpPort]:
    limits = Limits(max_items=8, max_item_tokens=60, max_batch_tokens=512)
    with serving_reward(tiny_reward_folder, limits=limits) as (_, port):
        yield port


async def fetch_rewards_via_http(
    endpoints: list[str], queries: list[str], prompts: list[str], labels: list[Any]
) -> list[dict[str, Any]]:
    """Replies of the servers, among which the queries are divided."""
    batch_size = (len(queries) + len(endpoints) - 1) // len(endpoints)
    timeout = aiohttp.ClientTimeout(total=180)

    async def post(url: str, data: dict[str, Any]) -> dict[str, Any]:
        for _ in range(ATTEMPTS):
            with contextlib.suppress(aiohttp.ClientError):
                async with (
                    aiohttp.ClientSession(timeout=timeout) as session,
                    session.post(url, json=data) as response,
                ):
                    response.raise_for_status()
                    return await response.json()
        raise RuntimeError(f"Request error for {ATTEMPTS} times")

    tasks = []
    for index, endpoint in enumerate(endpoints):
        part = slice(index * batch_size, min((index + 1) * batch_size, len(queries)))
        payload = {"query": queries[part], "prompts": prompts[part], "labels": labels[part]}
        tasks.append(asyncio.create_task(post(endpoint, payload)))
    return await asyncio.gather(*tasks)


def reward_of(replies: list[dict[str, Any]]) -> dict[str, Any]:
    """What is read of the replies for one sample."""
    info = replies[0]
    scores = info.get("scores")
    return {
        "reward": info.get("rewards"),
        "scores": info.get("rewards") if scores is None else scores,
        "extra_logs": info.get("extra_logs") or {},
    }


def tensors_of(response: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a training batch gets of it."""
    info = {
        "reward": torch.tensor([response["reward"]]),
        "score": torch.tensor([response["scores"]]),
    }
    for name, value in response["extra_logs"].items():
        info[name] = torch.tensor([value])
    return info


def ask_as_before(url: str, queries: list[str]) -> torch.Tensor:
    """Of versions up to 0.8, which have one number of several samples in one call."""
    response = requests.post(
        url=url,
        json={"query": queries, "prompts": queries, "labels": [None] * len(queries)},
        headers={"Content-Type": "application/json"},
        timeout=180,
    )
    response.raise_for_status()
    assert "rewards" in response.json()
    return torch.tensor(response.json().get("rewards"))


def ask(port: HttpPort, queries: list[str], *, query: str = "", servers: int = 1) -> Any:
    urls = [f"http://127.0.0.1:{port.port}/get_reward{query}"] * servers
    prompts = [query.partition("<|assistant|>")[0] for query in queries]
    return asyncio.run(fetch_rewards_via_http(urls, queries, prompts, [None] * len(queries)))


@pytest.fixture(scope="module")
def theirs(tiny_reward_folder: Path) -> list[float]:
    """Scores as OpenRLHF's server computes them: no special tokens added, a row at a time."""
    tokenizer = load_tokenizer(tiny_reward_folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_reward_folder)
    scores = []
    for text in QUERIES:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            scores.append(model.eval()(input_ids=ids).logits.item())
    return scores


@pytest.mark.parametrize("servers", [1, 2])
def test_the_trainer_gets_the_scores_of_its_texts(
    port: HttpPort, theirs: list[float], servers: int
) -> None:
    replies = ask(port, QUERIES, servers=servers)
    assert len(replies) == servers
    rewards = [reward for reply in replies for reward in reply["rewards"]]
    np.testing.assert_allclose(rewards, theirs, atol=1e-5)
    assert [score for reply in replies for score in reply["scores"]] == rewards
    assert all(reply["extra_logs"] == {} for reply in replies)


def test_one_text_at_a_time_makes_the_tensors_that_the_trainer_makes(
    port: HttpPort, theirs: list[float]
) -> None:
    tensors = tensors_of(reward_of(ask(port, QUERIES[:1])))
    assert tensors.keys() == {"reward", "score"}
    assert tensors["reward"].shape == tensors["score"].shape == (1, 1)
    assert tensors["score"].item() == pytest.approx(theirs[0], abs=1e-5)


def test_servers_without_a_query_of_their_own_answer_too(
    port: HttpPort, theirs: list[float]
) -> None:
    """A trainer with two addresses sends one query to the first and none to the second, and has no
    reward when either fails."""
    replies = ask(port, QUERIES[:1], servers=2)
    assert replies[1] == {"rewards": [], "scores": [], "extra_logs": {}}
    assert reward_of(replies)["scores"] == [pytest.approx(theirs[0], abs=1e-5)]


def test_older_versions_get_their_tensor(port: HttpPort, theirs: list[float]) -> None:
    rewards = ask_as_before(f"http://127.0.0.1:{port.port}/get_reward", QUERIES)
    assert rewards.dtype == torch.float32
    np.testing.assert_allclose(rewards.numpy(), theirs, atol=1e-5)


def test_the_address_says_what_the_body_cannot(port: HttpPort, theirs: list[float]) -> None:
    (reply,) = ask(port, QUERIES, query="?normalize=true")
    wanted = [(score - MEAN) / STD for score in theirs]
    np.testing.assert_allclose(reply["rewards"], wanted, atol=1e-5)
    long = ["word " * 200]
    refused = {"path": "/get_reward", "status": "400"}
    before = REGISTRY.get_sample_value("kleash_http_requests_total", refused) or 0.0
    with pytest.raises(RuntimeError, match="for 5 times"):
        ask(port, long)
    after = REGISTRY.get_sample_value("kleash_http_requests_total", refused) or 0.0
    assert after - before == ATTEMPTS
    for side in ("left", "right"):
        (reply,) = ask(port, long, query=f"?truncation={side}")
        assert len(reply["rewards"]) == 1


def test_a_text_without_a_score_fails_the_call_and_is_named(port: HttpPort) -> None:
    error = port.post("/get_reward", {"query": ["a", "word " * 200]})
    assert error.status == 400
    assert error.error["field"] == "query[1]"
    assert error.error["reason"] == "INPUT_TOO_LONG"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "query"),
        ([], "query"),
        ({"query": "text"}, "query"),
        ({"query": ["a", 1]}, "query[1]"),
        ({"query": ["\ud800"]}, "query[0]"),
        ({"query": ["a"] * 9}, "items"),
    ],
)
def test_a_body_that_is_not_theirs_is_refused(port: HttpPort, body: Any, field: str) -> None:
    reply = port.post("/get_reward", body)
    assert (reply.status, reply.error["field"]) == (400, field)


def test_other_fields_of_the_body_are_not_read(port: HttpPort) -> None:
    extra = {"prompts": 3, "labels": {"a": [None]}, "new": True}
    plain = port.post("/get_reward", {"query": QUERIES}).json
    assert port.post("/get_reward", {"query": QUERIES, **extra}).json == plain


@pytest.mark.parametrize("query", ["truncation=up", "normalize=1", "nodel=x"])
def test_an_option_that_is_not_there_is_refused(port: HttpPort, query: str) -> None:
    reply = port.post(f"/get_reward?{query}", {"query": ["a"]})
    assert (reply.status, reply.error["field"]) == (400, query.partition("=")[0])


def test_a_model_that_is_not_there_is_refused(port: HttpPort) -> None:
    reply = port.post("/get_reward?model=none", {"query": ["a"]})
    assert (reply.status, reply.error["reason"]) == (404, "MODEL_NOT_SERVED")


def _result(score: float, *parts: float) -> reward_pb2.ScoreResult:
    names = ("helpful", "harmless")
    return reward_pb2.ScoreResult(
        code=common_pb2.ITEM_STATUS_CODE_OK,
        score=score,
        components=[
            reward_pb2.ComponentScore(name=name, score=part)
            for name, part in zip(names, parts, strict=False)
        ],
        uncertainty=0.5,
    )


def test_parts_of_a_score_are_logged() -> None:
    response = reward_pb2.ScoreResponse(results=[_result(1, 2, 3), _result(4, 5, 6)])
    assert write_get_reward(response) == {
        "rewards": [1, 4],
        "scores": [1, 4],
        "extra_logs": {"helpful": [2, 5], "harmless": [3, 6], "uncertainty": [0.5, 0.5]},
    }


def test_a_score_that_is_not_finite_never_leaves() -> None:
    bad = reward_pb2.ScoreResult(
        code=common_pb2.ITEM_STATUS_CODE_NON_FINITE, error_message="the score is NaN."
    )
    with pytest.raises(InvalidRequest, match=r"query\[1\]: the score is NaN"):
        write_get_reward(reward_pb2.ScoreResponse(results=[_result(1), bad]))
