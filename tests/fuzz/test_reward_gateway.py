"""Any request to the HTTP port gets an answer or a clear status; schemathesis makes some."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.fuzz import gateway, gateway_wire, reward
from tests.services.http_client import HttpPort, serving_reward

from kleash.reward.http import API

pytestmark = pytest.mark.services

PATHS = [(route.verb, route.path) for route in API.routes]
COUNT = 600
CASES = 60
CALL_S = 30.0
assert API.openapi is not None
DOCUMENT = json.loads(API.openapi.read_text(encoding="utf-8"))
# The server is asked to be patient: a case that waits no time at all is answered so, rightly.
PATIENT = {"X-Request-Timeout-S": "30"}
CHECKS = (status_code_conformance, content_type_conformance, response_schema_conformance)


@schemathesis.serializer("application/x-ndjson")
def write_line(context: schemathesis.SerializationContext, value: Any) -> Any:
    """One line, or as many as a list has."""
    values = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(each).encode() + b"\n" for each in values)


@pytest.fixture(scope="module")
def port(tiny_reward_folder: Path) -> Iterator[HttpPort]:
    with serving_reward(tiny_reward_folder, limits=reward.LIMITS) as (_, port):
        yield port


def test_any_body_gets_an_answer_or_a_clear_status(port: HttpPort) -> None:
    with contextlib.closing(gateway.Target(port.port)) as target:
        outcomes = gateway.run(target, COUNT, seed=3)
    assert port.post("/v1/score", {"items": [{"text": "a"}]}).status == 200
    for path in gateway.PATHS:
        assert outcomes[f"{path} 200"] > 0
        assert outcomes[f"{path} 400"] > 0


def test_any_bytes_get_an_answer_or_a_clear_status(
    tiny_reward_folder: Path, tmp_path: Path
) -> None:
    outcomes = asyncio.run(gateway_wire.fuzz(tiny_reward_folder, COUNT, 3, tmp_path))
    for path in gateway.PATHS:
        assert outcomes[f"{path} 200"] > 0
        assert outcomes[f"{path} 400"] > 0
    for status in (400, 401, 404, 405):
        assert outcomes[f"spoiled {status}"] > 0


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("verb", "path"), PATHS)
def test_requests_of_the_document_are_answered_as_it_says(
    port: HttpPort, verb: str, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    statuses: set[int] = set()
    with requests.Session() as session:

        @settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            phases=[Phase.generate],
        )
        @given(case=schema[path][verb].as_strategy(generation_mode=mode))
        def feed(case: schemathesis.Case) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body.pop("model", None)  # a name that is chosen at random is served nowhere
                case.body.pop("revision", None)
            response = case.call(
                base_url=f"http://127.0.0.1:{port.port}",
                session=session,
                headers=PATIENT,
                timeout=CALL_S,
            )
            statuses.add(response.status_code)
            assert response.status_code in gateway.ALLOWED
            if response.status_code != 200:
                gateway.check_failure(response.json())
            case.validate_response(response, checks=list(CHECKS))

        feed()
    assert statuses
    # A document cannot say that a comparison needs a prompt with a turn and two responses.
    if mode is GenerationMode.POSITIVE and path != "/v1/compare":
        assert 200 in statuses
