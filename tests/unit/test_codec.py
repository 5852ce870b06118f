"""Per-token data on the wire, and errors to trailers and back."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from kleash.common.v1 import common_pb2
from kleash.rpc import errors
from kleash.rpc.codec import decode_floats, decode_ids, encode_floats, encode_ids

pytestmark = pytest.mark.unit


def test_ids_are_little_endian_int32() -> None:
    message = encode_ids([1, 258, -1])
    assert message.count == 3
    assert message.ids_i32 == b"\x01\0\0\0\x02\x01\0\0\xff\xff\xff\xff"


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", ">i4"])
def test_ids_of_any_integer_type_come_back(dtype: str) -> None:
    ids = np.array([0, 7, 200], dtype=dtype)
    decoded = decode_ids(encode_ids(ids), field="tokens")
    assert decoded.dtype == np.int32
    assert decoded.tolist() == [0, 7, 200]


def test_a_slice_with_strides_is_sent_by_value() -> None:
    assert decode_ids(encode_ids(np.arange(10)[::3]), field="tokens").tolist() == [0, 3, 6, 9]


def test_no_ids_and_no_floats() -> None:
    assert decode_ids(encode_ids([]), field="tokens").shape == (0,)
    assert decode_floats(encode_floats(np.zeros(0)), field="values").shape == (0,)


def test_ids_must_be_integers() -> None:
    with pytest.raises(TypeError):
        encode_ids(np.array([1.5]))


def test_floats_keep_every_bit_of_float32() -> None:
    values = np.array([-0.1, 1e-42, -np.inf, 3.4e38], dtype=np.float32)
    decoded = decode_floats(encode_floats(values), field="values")
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == values.tobytes()


def test_bytes_that_do_not_match_the_count_are_refused_with_the_path() -> None:
    message = common_pb2.TokenIds(ids_i32=b"\0" * 12, count=4)
    with pytest.raises(errors.InvalidRequest) as caught:
        decode_ids(message, field="items[3].tokens")
    assert caught.value.field == "items[3].tokens.ids_i32"
    assert "12 bytes" in str(caught.value)
    assert "count is 4" in str(caught.value)
    with pytest.raises(errors.InvalidRequest, match="values_f32 holds 5 bytes"):
        decode_floats(common_pb2.TokenFloats(values_f32=b"\0" * 5, count=1), field="x")


class _Answer(grpc.RpcError):
    """A failed call as gRPC hands it to a client."""

    def __init__(self, code: grpc.StatusCode, text: str, trailers: tuple = ()) -> None:
        self._code, self._text, self._trailers = code, text, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> tuple:
        return self._trailers


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("two ids", field="items[1].tokens"),
        errors.PreconditionFailed(
            "other tokenizer", reason="TOKENIZER_MISMATCH", metadata={"served": "ab"}
        ),
        errors.NotFound("no such model", reason="MODEL_NOT_SERVED", field="model"),
        errors.Overloaded("queue is full", reason="QUEUE_FULL", retry_after_s=0.75),
        errors.Unavailable("loading", reason="LOADING"),
        errors.DeadlineExceeded("late", reason="SERVER_TIME_LIMIT"),
        errors.Cancelled("gone", reason="CANCELLED"),
        errors.PermissionDenied("no", reason="TOKEN"),
        errors.InternalError("id 1", reason="INTERNAL", metadata={"correlation_id": "1"}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_back_as_it_was_raised(error: errors.ServiceError) -> None:
    answer = _Answer(error.code, error.message, errors.trailing_metadata(error))
    again = errors.from_rpc_error(answer)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.reason == (error.reason or error.code.name)
    assert (again.field, again.metadata) == (error.field, error.metadata)
    assert again.retry_after_s == error.retry_after_s


def test_the_trailers_are_google_rpc() -> None:
    error = errors.Overloaded("queue is full", reason="QUEUE_FULL", retry_after_s=0.25)
    trailers = dict(errors.trailing_metadata(error))
    assert trailers["grpc-retry-pushback-ms"] == "250"
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])  # type: ignore[arg-type]
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "kleash.dev")
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 250


def test_an_overload_that_waiting_does_not_cure_forbids_retries() -> None:
    trailers = dict(
        errors.trailing_metadata(errors.Overloaded("no memory", reason="OUT_OF_MEMORY"))
    )
    assert trailers["grpc-retry-pushback-ms"] == "-1"


def test_a_server_that_does_not_answer_is_named() -> None:
    text = "last error: UNKNOWN: ipv4:10.0.0.7:50051: Failed to connect to remote host"
    answer = _Answer(grpc.StatusCode.UNAVAILABLE, text)
    unreachable = errors.from_rpc_error(answer)
    assert isinstance(unreachable, errors.Unavailable)
    assert "cannot reach the service at 10.0.0.7:50051:" in str(unreachable)
    assert "at reward:50051:" in str(errors.from_rpc_error(answer, address="reward:50051"))


def test_a_message_over_the_size_limit_is_the_callers_mistake() -> None:
    text = "SERVER: Received message larger than max (70000000 vs. 67108864)"
    error = errors.from_rpc_error(_Answer(grpc.StatusCode.RESOURCE_EXHAUSTED, text))
    assert isinstance(error, errors.InvalidRequest)
    assert error.reason == "MESSAGE_TOO_LARGE"


def test_damaged_details_leave_the_status() -> None:
    answer = _Answer(
        grpc.StatusCode.NOT_FOUND, "gone", (("grpc-status-details-bin", b"\xff\xff\xff"),)
    )
    assert isinstance(errors.from_rpc_error(answer), errors.NotFound)
