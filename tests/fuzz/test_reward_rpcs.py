"""Any bytes to any RPC of the reward service get an answer or a clear status, over real gRPC."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz import reward
from tests.fuzz.messages import build, spoiled
from tests.fuzz.verdict import check_error, check_response

from kleash.client.reward import RewardClient
from kleash.lm.load import load_sequence_classifier, load_tokenizer, save_checkpoint_folder
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.reward.v1 import admin_pb2, reward_pb2
from kleash.rpc.errors import InternalError, from_rpc_error
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

CALL_S = 20.0
MODELS = ("sound", "broken")
METHODS: dict[str, Any] = {
    **reward.METHODS,
    "GetModel": reward_pb2.GetModelRequest,
    "ListModels": reward_pb2.ListModelsRequest,
    "Admin/LoadModel": admin_pb2.LoadModelRequest,
    "Admin/UnloadRevision": admin_pb2.UnloadRevisionRequest,
}
RESPONSES: dict[str, Any] = {
    "Score": reward_pb2.ScoreResponse,
    "ScoreStream": reward_pb2.ScoreStreamResponse,
    "Compare": reward_pb2.CompareResponse,
    "CountTokens": reward_pb2.CountTokensResponse,
    "GetModel": reward_pb2.GetModelResponse,
    "ListModels": reward_pb2.ListModelsResponse,
    "Admin/LoadModel": admin_pb2.LoadModelResponse,
    "Admin/UnloadRevision": admin_pb2.UnloadRevisionResponse,
}


class Server:
    """Calls by method and bytes."""

    def __init__(self, channel: grpc.Channel, hints: dict[str, list[Any]]) -> None:
        self.hints = hints
        self._channel = channel

    def call(self, method: str, raw: bytes) -> str:
        """Name of the status; the answer is checked."""
        service = "RewardAdminService" if method.startswith("Admin/") else "RewardService"
        path = f"/kleash.reward.v1.{service}/{method.removeprefix('Admin/')}"
        try:
            if method == "ScoreStream":
                answers = list(self._channel.stream_stream(path)(iter([raw]), timeout=CALL_S))
            else:
                answers = [self._channel.unary_unary(path)(raw, timeout=CALL_S)]
        except grpc.RpcError as error:
            fault = from_rpc_error(error)
            check_error(fault)
            return fault.code.name
        for answer in answers:
            check_response(RESPONSES[method].FromString(answer))
        return "OK"

    def is_well(self) -> None:
        """Still answers as before."""
        raw = reward_pb2.ScoreRequest(items=[reward_pb2.ScoreItem(text="hello")])
        assert self.call("Score", raw.SerializeToString()) == "OK"


@pytest.fixture(scope="module")
def broken_folder(tiny_reward_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that scores NaN, and infinity at every token of the second kind."""
    folder = tmp_path_factory.mktemp("broken") / "reward"
    model = load_sequence_classifier(tiny_reward_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[::2] = float("nan")
        model.score.weight.fill_(3e38)
    save_checkpoint_folder(model, load_tokenizer(tiny_reward_folder), folder, {"stage": "broken"})
    return folder


@pytest.fixture(scope="module")
def server(tiny_reward_folder: Path, broken_folder: Path) -> Iterator[Server]:
    config = RewardConfig.model_validate(
        {
            "models": {
                "sound": {"model": tiny_reward_folder},
                "broken": {"model": broken_folder},
            },
            "default": "sound",
            "limits": reward.LIMITS,
            "admins": ["*"],
            "model_folders": [tiny_reward_folder],
        }
    )
    with (
        BackgroundServer([RewardService(config)], ServerConfig()) as server,
        RewardClient(server.address) as client,
        grpc.insecure_channel(server.address, options=[("grpc.enable_retries", 0)]) as channel,
    ):
        facts = client.get_model()
        hints = {
            "tokenizer_sha256": [facts.tokenizer_sha256],
            "model": [*MODELS, ""],
            "revision": ["", facts.model.revision],
            "folder": ["/etc", str(tiny_reward_folder / "..")],
            "role": ["user", "assistant", "system"],
            "response_start": [0, 1, 5],
            "truncation": [0, 1, 2, 3],
        }
        yield Server(channel, hints)


@pytest.mark.parametrize("method", METHODS)
def test_any_message_gets_an_answer_or_a_clear_status(server: Server, method: str) -> None:
    outcomes: set[str] = set()

    @settings(
        max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
    )
    @given(seed=st.integers(0, 2**32))
    def feed(seed: int) -> None:
        source = random.Random(seed).randint
        raw = build(METHODS[method], source, server.hints).SerializeToString()
        outcomes.add(server.call(method, raw))

    feed()
    server.is_well()
    assert "UNKNOWN" not in outcomes
    if not method.startswith("Admin/"):
        assert "OK" in outcomes


@pytest.mark.parametrize("method", METHODS)
def test_any_bytes_get_an_answer_or_a_clear_status(server: Server, method: str) -> None:
    @settings(
        max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
    )
    @given(raw=st.binary(max_size=200), seed=st.integers(0, 2**32), is_spoiled=st.booleans())
    def feed(raw: bytes, seed: int, is_spoiled: bool) -> None:
        source = random.Random(seed).randint
        if is_spoiled:
            message = build(METHODS[method], source, server.hints).SerializeToString()
            raw = spoiled(message, source)
        server.call(method, raw)

    feed()
    server.is_well()


def test_a_broken_model_tells_no_number(server: Server) -> None:
    for token_scores in (False, True):
        request = reward_pb2.ScoreRequest(
            model="broken",
            items=[reward_pb2.ScoreItem(text="what is 3 plus 4?")],
            options=reward_pb2.ScoreOptions(return_token_scores=token_scores),
        )
        assert server.call("Score", request.SerializeToString()) == "OK"


def test_the_checks_of_what_leaves_can_fail() -> None:
    result = reward_pb2.ScoreResult(code=1, score=float("nan"))  # type: ignore[arg-type]
    for bad in (result, reward_pb2.ScoreResponse(results=[result])):
        with pytest.raises(AssertionError):
            check_response(bad)
    with pytest.raises(AssertionError):
        check_error(InternalError("internal error in Score."))


def test_a_run_in_process_reaches_every_outcome(tiny_reward_folder: Path) -> None:
    outcomes = reward.run(reward.target_of(tiny_reward_folder), count=3000, seed=7)
    assert outcomes.total() == 3000
    for method in reward.METHODS:
        assert outcomes[f"{method} OK"]
        assert outcomes[f"{method} InvalidRequest"]
        assert outcomes[f"{method} undecodable"]
