"""What the audit lines of the reference and the policy service tell; the reward service's are in
test_quotas.py."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.services.doubler import error_of, eventually

from kleash.client.policy import PolicyClient
from kleash.client.reference import ReferenceClient
from kleash.client.types import Prompt, Sampling
from kleash.lm.sequences import TokenSequence
from kleash.policy.config import PolicyConfig
from kleash.policy.service import PolicyService
from kleash.reference.config import ReferenceConfig
from kleash.reference.service import ReferenceService
from kleash.reference.v1 import reference_pb2, reference_pb2_grpc
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.server import BackgroundServer, ServerConfig

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[BackgroundServer]:
    reference = ReferenceService(ReferenceConfig(model=tiny_folder))
    policy = PolicyService(PolicyConfig(model=tiny_folder))
    with BackgroundServer([reference, policy], ServerConfig(audit="calls")) as server:
        yield server


def fields_of(caplog: pytest.LogCaptureFixture, method: str) -> dict[str, str]:
    """Of the last line about ``method``, which is written when the call has ended."""

    def lines() -> list[str]:
        told = [each.getMessage() for each in caplog.records if each.name == "kleash.audit"]
        return [line for line in told if f"/{method} " in line]

    eventually(lambda: bool(lines()))
    return dict(part.split("=", 1) for part in lines()[-1].split(" "))


def test_the_reference_service_tells_model_items_and_tokens(
    server: BackgroundServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kleash.audit")
    sequences = [TokenSequence(np.arange(5, 5 + n, dtype=np.int32), 2) for n in (4, 9)]
    with ReferenceClient(server.address) as client:
        about = client.get_model()
        client.log_probs(sequences, temperature=1.0, tokenizer_sha256=about.tokenizer_sha256)
    line = fields_of(caplog, "LogProbs")
    assert line["model"] == about.model.name
    assert line["revision"] == about.model.revision
    assert (line["items"], line["tokens"], line["status"]) == ("2", "13", "OK")
    asked = fields_of(caplog, "GetModel")
    assert asked["model"] == about.model.name
    assert (asked["items"], asked["tokens"]) == ("-", "-")


def test_a_refused_request_of_the_reference_service_has_its_items(
    server: BackgroundServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kleash.audit")
    request = reference_pb2.LogProbsRequest(items=[reference_pb2.LogProbsItem()] * 3)
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = reference_pb2_grpc.ReferenceServiceStub(channel)
        assert isinstance(error_of(stub.LogProbs, request), InvalidRequest)
    line = fields_of(caplog, "LogProbs")
    assert line["status"] == "INVALID_ARGUMENT"
    assert (line["items"], line["tokens"]) == ("3", "-")


def test_the_policy_service_tells_prompts_and_generated_tokens(
    server: BackgroundServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="kleash.audit")
    prompts = [Prompt(f"p{n}", np.array([5, 6, 7], np.int32), num_samples=2) for n in range(3)]
    with PolicyClient(server.address) as client:
        about = client.get_policy()
        sampling = Sampling(seed=1, max_new_tokens=4)
        responses = list(client.generate(prompts, sampling))
    line = fields_of(caplog, "Generate")
    assert line["model"] == about.model.name
    assert line["items"] == "3"
    assert line["tokens"] == str(sum(len(each.ids) for each in responses))
    assert fields_of(caplog, "GetPolicy")["revision"] == about.model.revision
