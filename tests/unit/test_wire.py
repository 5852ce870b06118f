"""Requests with more fields than anybody needs are known before they are parsed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kleash.common.v1 import common_pb2
from kleash.reward.v1 import reward_pb2
from kleash.rpc.errors import InvalidRequest
from kleash.rpc.wire import check_fields

pytestmark = pytest.mark.unit

DESCRIPTOR: Any = reward_pb2.ScoreRequest.DESCRIPTOR


def num_fields(raw: bytes) -> int:
    """The least limit that ``raw`` is within."""
    for limit in range(1000):
        try:
            check_fields(raw, DESCRIPTOR, limit)
        except InvalidRequest:
            continue
        return limit
    raise AssertionError


def test_the_refusal_says_what_to_do() -> None:
    with pytest.raises(InvalidRequest, match="more than 3 fields; send fewer items") as caught:
        check_fields(b"\x1a\x00" * 4, DESCRIPTOR, 3)
    assert caught.value.reason == "TOO_LARGE"


def test_fields_of_messages_within_messages_count() -> None:
    message = common_pb2.Message(role="user", content="x" * 500)
    conversation = common_pb2.Conversation(messages=[message, message])
    request = reward_pb2.ScoreRequest(
        model="m",  # 1
        items=[
            reward_pb2.ScoreItem(item_id="a", conversation=conversation),  # 1 + 2 + 2 * (1 + 2)
            reward_pb2.ScoreItem(text="x" * 300),  # 1 + 1
            reward_pb2.ScoreItem(),  # 1
        ],
        options=reward_pb2.ScoreOptions(normalize=True),  # 1 + 1
    )
    assert num_fields(request.SerializeToString()) == 1 + 9 + 2 + 1 + 2


def test_empty_and_unknown_fields_count() -> None:
    assert num_fields(b"\x1a\x00" * 7) == 7
    assert num_fields(b"\x78\x01" * 9) == 9
    assert num_fields(b"\x7d" + b"abcd" + b"\x79" + b"abcdefgh") == 2


@given(st.binary(max_size=300))
def test_bytes_that_are_no_message_pass(raw: bytes) -> None:
    check_fields(raw, DESCRIPTOR)


def test_a_number_without_end_is_given_up() -> None:
    check_fields(b"\xff" * 10_000_000, DESCRIPTOR)


def test_lengths_beyond_the_end_do_not_leave_the_message() -> None:
    check_fields(b"\x1a\xff\xff\xff\x7f\x12\xff\xff\xff\x7f", DESCRIPTOR)
