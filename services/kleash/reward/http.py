"""Paths of the reward service over HTTP, and the calls that they stand for.

POST /get_reward answers as OpenRLHF's reward server does (openrlhf/cli/serve_rm.py), for trainers
that have its address as their remote reward URL. It is a Score of texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kleash.common.v1 import common_pb2
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.http_api import HttpApi, HttpRoute
from kleash.rpc.http_json import UNKNOWN_FIELD, WRONG_TYPE

SERVICE = "kleash.reward.v1.RewardService"
TRUNCATIONS = {
    "error": reward_pb2.TRUNCATION_ERROR,
    "left": reward_pb2.TRUNCATION_LEFT,
    "right": reward_pb2.TRUNCATION_RIGHT,
}
BOOLEANS = {"true": True, "false": False}
OPTIONS = ("model", "revision", "truncation", "normalize")
"""What the query of the address may hold."""


def read_get_reward(value: Any, query: Mapping[str, str]) -> reward_pb2.ScoreRequest:
    """A Score of the texts of ``query``; ``prompts``, ``labels`` and other fields are not read.

    The options come from the address, the one thing that a user of OpenRLHF can set.
    Raises InvalidRequest.
    """
    for name in query:
        if name not in OPTIONS:
            raise InvalidRequest(
                f"the address has {name[:64]!r} in its query; there is {', '.join(OPTIONS)}.",
                field=name[:64],
                reason=UNKNOWN_FIELD,
            )
    texts = value.get("query") if isinstance(value, dict) else None
    if not isinstance(texts, list):
        raise InvalidRequest(
            "the body has no list 'query' of texts, each a prompt with its response.",
            field="query",
            reason=WRONG_TYPE,
        )
    request = reward_pb2.ScoreRequest(
        model=query.get("model", ""),
        revision=query.get("revision", ""),
        options=reward_pb2.ScoreOptions(
            truncation=_choice(query, "truncation", TRUNCATIONS, "error"),
            normalize=_choice(query, "normalize", BOOLEANS, "false"),
        ),
    )
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise _bad_text(index, "is not a text")
        try:
            request.items.add(text=text)
        except UnicodeEncodeError:
            raise _bad_text(index, "holds half of a surrogate pair, which is no letter") from None
    return request


def write_get_reward(response: reward_pb2.ScoreResponse) -> dict[str, Any]:
    """Scores as OpenRLHF reads them. Raises InvalidRequest for a text without one.

    A list of numbers has no room for a status, and a made-up number would be trained on.
    """
    for index, result in enumerate(response.results):
        if result.code != common_pb2.ITEM_STATUS_CODE_OK:
            raise InvalidRequest(
                f"query[{index}]: {result.error_message}",
                field=f"query[{index}]",
                reason=common_pb2.ItemStatusCode.Name(result.code).removeprefix(
                    "ITEM_STATUS_CODE_"
                ),
            )
    scores = [result.score for result in response.results]
    logs: dict[str, list[float]] = {}
    for result in response.results:
        for component in result.components:
            logs.setdefault(component.name, []).append(component.score)
        if result.components:
            logs.setdefault("uncertainty", []).append(result.uncertainty)
    return {"rewards": scores, "scores": scores, "extra_logs": logs}


def _choice(query: Mapping[str, str], name: str, choices: Mapping[str, Any], default: str) -> Any:
    given = query.get(name, default)
    if given not in choices:
        raise InvalidRequest(
            f"{name} in the address is {given[:64]!r}; it is one of {', '.join(choices)}.",
            field=name,
            reason=WRONG_TYPE,
        )
    return choices[given]


def _bad_text(index: int, fault: str) -> InvalidRequest:
    return InvalidRequest(f"query[{index}] {fault}.", field=f"query[{index}]", reason=WRONG_TYPE)


API = HttpApi(
    routes=(
        HttpRoute("POST", "/v1/score", SERVICE, "Score"),
        HttpRoute("POST", "/v1/score_stream", SERVICE, "ScoreStream"),
        HttpRoute("POST", "/v1/compare", SERVICE, "Compare"),
        HttpRoute("POST", "/v1/count_tokens", SERVICE, "CountTokens"),
        HttpRoute("GET", "/v1/model", SERVICE, "GetModel"),
        HttpRoute("GET", "/v1/models", SERVICE, "ListModels"),
        HttpRoute(
            "POST",
            "/get_reward",
            SERVICE,
            "Score",
            read=read_get_reward,
            write=write_get_reward,
        ),
    ),
    openapi=Path(__file__).with_name("openapi.json"),
)
