"""The description of the HTTP port is what the protos and the paths say now."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from google.protobuf import json_format
from tests.fuzz.messages import build, numbers_of

from kleash.reward.http import API
from kleash.reward.v1 import reward_pb2
from kleash.rpc.http_json import write_message

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
assert API.openapi is not None
TEXT = API.openapi.read_text(encoding="utf-8")
DOCUMENT: dict[str, Any] = json.loads(TEXT)


def test_the_file_is_fresh() -> None:
    spec = importlib.util.spec_from_file_location("openapi", ROOT / "protos" / "openapi.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stale = "services/kleash/reward/openapi.json is stale: run make openapi"
    assert module.build() == TEXT, stale


def test_every_path_field_and_message_is_explained() -> None:
    paths = DOCUMENT["paths"]
    assert {(route.verb.lower(), route.path) for route in API.routes} <= {
        (verb, path) for path, verbs in paths.items() for verb in verbs
    }
    for verbs in paths.values():
        for operation in verbs.values():
            assert operation["summary"].endswith(".")
    for name, schema in DOCUMENT["components"]["schemas"].items():
        if name == "Health":
            continue
        assert schema["description"], name
        for field, its in schema.get("properties", {}).items():
            assert name == "Error" or its.get("description"), f"{name}.{field}"


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return jsonschema.Draft202012Validator(schema)


def test_requests_that_the_schemas_allow_are_read_and_others_are_not() -> None:
    good = {"items": [{"item_id": "a", "text": "b"}], "options": {"truncation": "TRUNCATION_LEFT"}}
    json_format.ParseDict(good, reward_pb2.ScoreRequest())
    its = validator("ScoreRequest")
    assert its.is_valid(good)
    for bad in (
        {"items": [{"text": 1}]},
        {"items": [{}]},
        {"items": [{"text": "a", "conversation": {}}]},
        {"items": [{"text": "a"}], "more": 1},
        {"options": {"truncation": "UP"}},
    ):
        assert not its.is_valid(bad), bad


@pytest.mark.parametrize(
    "make",
    [
        reward_pb2.ScoreResponse,
        reward_pb2.ScoreStreamResponse,
        reward_pb2.CompareResponse,
        reward_pb2.CountTokensResponse,
        reward_pb2.GetModelResponse,
        reward_pb2.ListModelsResponse,
    ],
)
def test_what_is_written_is_what_the_schemas_say(make: Any) -> None:
    name = make.DESCRIPTOR.name
    written = 0
    for seed in range(60):
        message = build(make, numbers_of(random.Random(seed)), {"score": [0.5], "mean": [0.0]})
        try:
            value = write_message(message)
        except Exception:
            continue
        if "TRUNCATION" in str(value) or not _names_are_known(value):
            continue
        written += 1
        validator(name).validate(value)
    assert written > 3


def _names_are_known(value: Any) -> bool:
    """Enums whose number has no name are written as numbers, and never sent."""
    if isinstance(value, list):
        return all(map(_names_are_known, value))
    if not isinstance(value, dict):
        return True
    enums = (value.get("code", ""), value.get("kind", ""))
    return all(isinstance(each, str) for each in enums) and all(
        map(_names_are_known, value.values())
    )
