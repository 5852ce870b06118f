"""What the reward service refuses, with which status and details, and how a dead one looks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import prometheus_client
import pytest

from kleash.client.reward import RewardClient
from kleash.common.v1 import common_pb2
from kleash.lm.digest import tokenizer_sha256
from kleash.lm.load import load_tokenizer
from kleash.lm.sequences import TokenSequence
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.reward.v1 import reward_pb2, reward_pb2_grpc
from kleash.rpc.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    Unavailable,
    from_rpc_error,
)
from kleash.rpc.requests import Limits
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services

LIMITS = Limits(
    max_items=64, max_batch_tokens=512, max_queued_tokens=40_000, max_message_bytes=200_000
)
SEQUENCE = TokenSequence(np.array([5, 6, 7], dtype=np.int32), 1)


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
def digest(tiny_reward_folder: Path) -> str:
    return tokenizer_sha256(load_tokenizer(tiny_reward_folder))


def token_item(ids: list[int], digest: str) -> reward_pb2.ScoreItem:
    raw = np.array(ids, dtype="<i4")
    return reward_pb2.ScoreItem(
        tokens=common_pb2.TokenSequence(
            tokens=common_pb2.TokenIds(ids_i32=raw.tobytes(), count=len(raw)),
            tokenizer_sha256=digest,
        )
    )


def refusal(call: Any, request: Any) -> Any:
    """The typed error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    return from_rpc_error(caught.value)


def test_another_tokenizer_is_refused(client: RewardClient, digest: str) -> None:
    labels = {"service": "reward", "reason": "tokenizer"}
    count = prometheus_client.REGISTRY.get_sample_value
    before = count("kleash_requests_rejected_total", labels) or 0
    with pytest.raises(PreconditionFailed) as caught:
        client.score_tokens([SEQUENCE] * 2, tokenizer_sha256="ab" * 32)
    error = caught.value
    assert (error.reason, error.field) == ("TOKENIZER_MISMATCH", "items[0].tokens.tokenizer_sha256")
    assert error.metadata == {"requested": "ab" * 32, "served": digest}
    assert digest in error.message
    assert "ab" * 32 in error.message
    assert count("kleash_requests_rejected_total", labels) == before + 1
    with pytest.raises(InvalidRequest, match="tokenizer_sha256 is empty"):
        client.score_tokens([SEQUENCE], tokenizer_sha256="")


def test_model_and_revision_are_checked(server: BackgroundServer, client: RewardClient) -> None:
    served = client.get_model().model
    with RewardClient(server.address, model=served.name, revision=served.revision) as right:
        assert right.score_texts(["hello"])[0].revision == served.revision
    with RewardClient(server.address, model="other") as wrong:
        with pytest.raises(NotFound, match=f"model 'other' .* has '{served.name}'"):
            wrong.score_texts(["hello"])
        with pytest.raises(NotFound, match="model 'other'"):
            wrong.compare("hello", ["a", "b"])
    with (
        RewardClient(server.address, revision="sha256:0") as old,
        pytest.raises(NotFound, match="revision 'sha256:0'"),
    ):
        old.score_texts(["hello"])


def test_limits_are_enforced_with_field_paths(
    stub: reward_pb2_grpc.RewardServiceStub, digest: str
) -> None:
    item = reward_pb2.ScoreItem(text="hello")
    error = refusal(stub.Score, reward_pb2.ScoreRequest(items=[item] * 65))
    assert (type(error), error.field) == (InvalidRequest, "items")
    assert "65" in error.message
    assert "64" in error.message
    large = reward_pb2.ScoreItem(text="x" * 200_001)
    error = refusal(stub.Score, reward_pb2.ScoreRequest(items=[large]))
    assert (type(error), error.field) == (InvalidRequest, "items")
    error = refusal(stub.CountTokens, reward_pb2.CountTokensRequest(items=[item] * 65))
    assert (type(error), error.field) == (InvalidRequest, "items")


def test_malformed_items_name_their_place(
    stub: reward_pb2_grpc.RewardServiceStub, digest: str
) -> None:
    good, odd, late = (token_item([5, 6], digest) for _ in range(3))
    odd.tokens.tokens.count = 3
    late.tokens.response_start = 3
    cases = [
        ([good, odd], "items[1].tokens.tokens.ids_i32"),
        ([good, good, late], "items[2].tokens.response_start"),
        ([reward_pb2.ScoreItem()], "items[0].input"),
    ]
    for items, field in cases:
        error = refusal(stub.Score, reward_pb2.ScoreRequest(items=items))
        assert (type(error), error.field) == (InvalidRequest, field)
    request = reward_pb2.ScoreRequest(items=[good])
    request.options.MergeFromString(b"\x08\x09")  # truncation = 9
    error = refusal(stub.Score, request)
    assert (type(error), error.field) == (InvalidRequest, "options.truncation")


SERVE = """
import asyncio, sys
from pathlib import Path
import torch
from kleash.reward.config import RewardConfig
from kleash.reward.service import RewardService
from kleash.rpc.server import ServerConfig, serve
torch.set_num_threads(1)
service = RewardService(RewardConfig(model=Path(sys.argv[1])))
asyncio.run(serve([service], ServerConfig(), on_ready=lambda port: print(port, flush=True)))
"""


@pytest.fixture
def process(tiny_reward_folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A reward service in a process of its own, and its address."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tiny_reward_folder)], stdout=subprocess.PIPE, text=True
    )
    with server:
        assert server.stdout is not None
        yield server, f"127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


def test_killed_server_is_unavailable_by_name(
    process: tuple[subprocess.Popen[str], str],
) -> None:
    """Frozen, a server makes the deadline pass; killed in the middle of a call, it is named."""
    server, address = process
    with RewardClient(address) as client, RewardClient(address, timeout_s=0.5) as hasty:
        assert client.score_texts(["hello"])[0].is_ok
        assert hasty.score_texts(["hello"])[0].is_ok
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded, match=address):
            hasty.score_texts(["hello"])
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(client.score_texts, ["hello"])
            server.kill()
            error = answer.exception(timeout=60)
    assert isinstance(error, Unavailable)
    assert address in error.message


def test_unreachable_server_is_named() -> None:
    with (
        RewardClient("127.0.0.1:1", timeout_s=10) as client,
        pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"),
    ):
        client.get_model()
