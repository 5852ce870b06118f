"""What may leave the reward service, whatever came in."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

from kleash.common.v1 import common_pb2
from kleash.rpc.codec import decode_floats
from kleash.rpc.errors import InternalError, ServiceError

# Of a trace, a path, an address of an object.
LEAKS = re.compile(r"Traceback|File \"|\.py\b|site-packages|object at 0x|<class '")


def check_error(error: ServiceError) -> None:
    """A bad input gets a clear status: whose fault, in a sentence, and nothing of the inside."""
    assert not isinstance(error, InternalError), error.message
    check_sentence(error.message)


def check_sentence(text: str) -> None:
    """A sentence that leaks nothing."""
    assert len(text) > 10, text
    assert not LEAKS.search(text), text


def check_response(message: Message) -> None:
    """Only finite numbers, scores exactly where the status is OK, faults with a sentence."""
    for field, value in message.ListFields():
        values = value if field.is_repeated else [value]
        if field.message_type is not None:
            for each in values:
                check_response(each)
        elif field.type in (Field.TYPE_FLOAT, Field.TYPE_DOUBLE):
            assert all(math.isfinite(each) for each in values), f"{field.full_name}: {values}"
    if isinstance(message, common_pb2.TokenFloats):
        assert np.isfinite(decode_floats(message, field="values")).all()
    if message.DESCRIPTOR.name == "ScoreResult":
        _check_result(message)


def _check_result(result: Any) -> None:
    assert result.code != common_pb2.ITEM_STATUS_CODE_UNSPECIFIED
    if result.code != common_pb2.ITEM_STATUS_CODE_OK:
        check_sentence(result.error_message)
        assert not result.score
        assert not result.HasField("token_scores")
        assert not result.components
        assert not result.uncertainty
