"""JSON to messages and back, against protobuf's own json_format."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from google.protobuf import json_format
from tests.fuzz.messages import build, numbers_of

from kleash.common.v1 import common_pb2
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import InternalError, InvalidRequest
from kleash.rpc.http_json import dump_json, parse_json, read_message, write_message

pytestmark = pytest.mark.unit

REQUESTS = (
    reward_pb2.ScoreRequest,
    reward_pb2.ScoreStreamRequest,
    reward_pb2.CompareRequest,
    reward_pb2.CountTokensRequest,
    reward_pb2.GetModelRequest,
)
LIMITS = common_pb2.Limits


@pytest.mark.parametrize("make", REQUESTS)
@pytest.mark.parametrize("preserves", [True, False])
def test_what_json_format_writes_is_read(make: Any, preserves: bool) -> None:
    for seed in range(100):
        message = build(make, numbers_of(random.Random(seed)), {})
        text = json_format.MessageToJson(message, preserving_proto_field_name=preserves)
        assert read_message(make, parse_json(text.encode())) == message


@pytest.mark.parametrize("make", REQUESTS)
def test_what_is_written_is_read_by_json_format(make: Any) -> None:
    for seed in range(100):
        message = build(make, numbers_of(random.Random(seed)), {})
        raw = dump_json(write_message(message))
        assert json_format.Parse(raw, make()) == message


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (3, 3),
        (3.0, 3),
        (3e2, 300),
        ("3", 3),
        (2**32 - 1, 2**32 - 1),
        (None, 0),
    ],
)
def test_integers_in_each_of_their_spellings(value: Any, wanted: int) -> None:
    message = read_message(LIMITS, {"max_items": value})
    assert message.max_items == wanted
    assert message == json_format.ParseDict({"max_items": value}, LIMITS())


@pytest.mark.parametrize(
    "value", [3.5, -1, 2**32, "x", " 3", "", "3" * 50, True, [], {}, 1e300, float("inf"), 10**400]
)
def test_what_is_no_integer(value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_message(LIMITS, {"max_items": value})
    assert caught.value.field == "max_items"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [1, 0.5, -3e300])
def test_numbers(value: float) -> None:
    assert read_message(reward_pb2.Component, {"weight": value}).weight == value


@pytest.mark.parametrize("value", ["NaN", "Infinity", "0.5", True, 1e999, 10**400])
def test_numbers_are_finite_and_no_texts(value: Any) -> None:
    with pytest.raises(InvalidRequest, match="finite number"):
        read_message(reward_pb2.Component, {"weight": value})


def test_a_number_of_four_bytes_stays_finite() -> None:
    make = reward_pb2.ScoreResult
    largest = read_message(make, {"score": 3.4028235e38})  # as JSON has the largest
    assert read_message(make, write_message(largest)) == largest
    assert largest.score == pytest.approx(3.4028235e38, rel=1e-7)
    for value in (3.402824e38, -1e39, 10**39):
        with pytest.raises(InvalidRequest, match=r"score is .* at most 3\.40282e\+38"):
            read_message(make, {"score": value})


@pytest.mark.parametrize("text", ["_-8=", "_-8", "/+8=", "/+8"])
def test_base64_in_both_alphabets_with_padding_and_without(text: str) -> None:
    assert read_message(common_pb2.TokenIds, {"ids_i32": text}).ids_i32 == b"\xff\xef"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(value: float) -> None:
    response = reward_pb2.ScoreResponse(results=[reward_pb2.ScoreResult(score=value)])
    with pytest.raises(InternalError, match="not finite"):
        write_message(response)
    with pytest.raises(InternalError, match="not finite"):
        write_message(reward_pb2.CompareResponse(preference=[1.0, value]))
    with pytest.raises(ValueError, match="JSON compliant"):
        dump_json({"rewards": [value]})


@pytest.mark.parametrize("raw", [b'"' + b'\\"' * 200_000, b'"' * 400_001, b'"\\'])
def test_a_text_without_an_end_is_passed_over_in_one_go(raw: bytes) -> None:
    """An expression that steps back through it would take hours here."""
    with pytest.raises(InvalidRequest, match="not JSON"):
        parse_json(raw)


def test_brackets_within_texts_do_not_count() -> None:
    text = "[" * 1000 + '\\"' + "{,"
    assert parse_json(json.dumps({"a": text}).encode()) == {"a": text}
