"""Clients of a trainer say that they are: where servers ask nobody who calls, it goes first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from kleash.ppo.config import ServicesConfig
from kleash.ppo.services import open_policy, open_scorers, open_weights
from kleash.rpc.errors import ServiceError
from kleash.rpc.quota import claimed_name

pytestmark = pytest.mark.services

CALLS = ("GetPolicy", "GetWeights", "reward.v1.RewardService/GetModel", "ReferenceService/GetModel")


class Recorder(grpc.GenericRpcHandler):
    """Offers nothing, and keeps by what name each method was called."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def service(self, handler_call_details: Any) -> None:
        name = claimed_name(handler_call_details.invocation_metadata)
        self.names[handler_call_details.method] = name


def test_every_client_of_a_trainer_says_so() -> None:
    recorder = Recorder()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads, handlers=[recorder])
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            config = ServicesConfig(policy=(address,), reward=address, reference=address)
            with (
                open_policy(address, config) as policy,
                open_scorers(config) as (reward, reference),
            ):
                weights = open_weights(address)
                asked: list[Callable[[], Any]] = [
                    policy.get_policy,
                    weights.get_weights,
                    reward.get_model,
                    reference.get_model,
                ]
                for ask in asked:
                    with pytest.raises(ServiceError):
                        ask()
                weights.close()
        finally:
            server.stop(None).wait()
    for call in CALLS:
        (name,) = [each for method, each in recorder.names.items() if method.endswith(call)]
        assert name == "kleash-trainer", call
