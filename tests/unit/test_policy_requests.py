"""What a Generate request may ask of the weights, and how a response's end is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kleash.client.policy import PolicyCalls
from kleash.client.types import GeneratedSequence, Prompt, Sampling
from kleash.lm.decode import Decoded, DecodeRequest
from kleash.lm.frozen import FrozenModel, load_frozen
from kleash.lm.load import load_causal_lm
from kleash.policy.config import PolicyConfig
from kleash.policy.requests import PolicyRequests, encode
from kleash.policy.v1 import policy_pb2
from kleash.rpc.errors import InternalError, PreconditionFailed, Unavailable
from kleash.weights.v1 import weights_pb2

pytestmark = pytest.mark.unit

PROMPT = Prompt("p", np.array([5, 6, 7], np.int32))
SAMPLING = Sampling(seed=1, max_new_tokens=4)


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> PolicyConfig:
    return PolicyConfig(model=tiny_folder)


@pytest.fixture(scope="module")
def frozen(config: PolicyConfig) -> FrozenModel:
    return load_frozen(config, load_causal_lm, max_item_tokens=64, max_batch_tokens=1024)


class Served:
    """A policy that reads requests and answers each with its prompt."""

    def __init__(self, config: PolicyConfig, frozen: FrozenModel) -> None:
        self.weights = weights_pb2.GetWeightsResponse(
            version=5, required_version=7, state=weights_pb2.REPLICA_STATE_SERVING
        )
        self.requests: list[DecodeRequest] = []
        self._reader = PolicyRequests(
            config, frozen, max_sequence_tokens=64, served=lambda: self.weights
        )
        self.calls = PolicyCalls(lambda _: policy_pb2.GetPolicyResponse(), self._generate)

    def generate(self, **settings: Any) -> list[GeneratedSequence]:
        return list(self.calls.generate([PROMPT], SAMPLING, **settings))

    def _generate(
        self, request: policy_pb2.GenerateRequest
    ) -> Iterator[policy_pb2.GenerateResponse]:
        self.requests = self._reader.generate(request)
        yield from encode([decoded(request) for request in self.requests])


def decoded(request: DecodeRequest) -> Decoded:
    return Decoded(request, request.prompt, np.zeros(3, np.float32), "stop", [(0, 3, 5)])


@pytest.fixture
def served(config: PolicyConfig, frozen: FrozenModel) -> Served:
    return Served(config, frozen)


def test_max_lag_bounds_the_versions_behind_the_newest_committed(served: Served) -> None:
    assert len(served.generate(max_lag=2)) == 1
    with pytest.raises(
        PreconditionFailed, match="version 5 is served, which is 2 behind version 7, and max_lag is"
    ) as caught:
        served.generate(max_lag=1)
    assert (caught.value.reason, caught.value.field) == ("WEIGHTS_TOO_OLD", "max_lag")
    assert caught.value.metadata == {"requested": "6", "served": "5"}
    with pytest.raises(PreconditionFailed, match="max_lag is 0"):
        served.generate(max_lag=0)
    served.weights.version = 9  # newer than what it must serve
    assert len(served.generate(max_lag=0)) == 1


def test_any_lag_is_fine_where_none_is_named(served: Served) -> None:
    served.weights.version = 0
    assert len(served.generate()) == 1
    assert served.requests[0].min_version == 0


def test_what_may_draw_is_remembered_for_a_request_that_waits(served: Served) -> None:
    for settings, expected in (
        ({"min_weights_version": 4}, 4),
        ({"max_lag": 3}, 4),
        ({"max_lag": 99}, 0),
        ({"min_weights_version": 3, "max_lag": 2}, 5),
        ({"min_weights_version": 5, "max_lag": 6}, 5),
    ):
        served.generate(**settings)
        assert served.requests[0].min_version == expected
    with pytest.raises(PreconditionFailed, match="version 6 is required and version 5") as caught:
        served.generate(min_weights_version=6, max_lag=9)
    assert (caught.value.reason, caught.value.field) == ("WEIGHTS_TOO_OLD", "min_weights_version")


def test_a_quarantined_replica_refuses_every_request(served: Served) -> None:
    served.weights.state = weights_pb2.REPLICA_STATE_QUARANTINED
    with pytest.raises(Unavailable, match="the replica is quarantined") as caught:
        served.generate()
    assert caught.value.reason == "QUARANTINED"
    assert caught.value.retry_after_s
    served.weights.state = weights_pb2.REPLICA_STATE_STAGED
    assert len(served.generate()) == 1


def test_finish_reasons_reach_the_client() -> None:
    request = DecodeRequest(PROMPT.ids, "p", 0, seed=1, max_new_tokens=4)
    ends = [
        replace(decoded(request), finish_reason=reason) for reason in ("stop", "length", "aborted")
    ]
    calls = PolicyCalls(lambda _: policy_pb2.GetPolicyResponse(), lambda _: encode(ends))
    prompt = Prompt("p", PROMPT.ids, num_samples=3)
    results = list(calls.generate([prompt], SAMPLING))
    assert [its.finish_reason for its in results] == ["stop", "length", "aborted"]


def test_a_finish_reason_of_a_newer_server_is_an_error() -> None:
    request = DecodeRequest(PROMPT.ids, "p", 0, seed=1, max_new_tokens=4)
    (response,) = encode([decoded(request)])
    response.sequences[0].finish_reason = 77  # pyright: ignore[reportAttributeAccessIssue]
    calls = PolicyCalls(lambda _: policy_pb2.GetPolicyResponse(), lambda _: [response])
    with pytest.raises(InternalError, match="finish reason 77 for prompt 'p'"):
        list(calls.generate([PROMPT], SAMPLING))
