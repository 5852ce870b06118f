"""Per-token data to and from the wire: raw little-endian bytes with a count, checked here once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kleash.common.v1 import common_pb2
from kleash.rpc.errors import InvalidRequest

_BYTES_PER_VALUE = 4
_INT32 = np.dtype("<i4")
_FLOAT32 = np.dtype("<f4")


def encode_ids(ids: np.ndarray | Sequence[int]) -> common_pb2.TokenIds:
    """Token ids (any integer array or list) as little-endian int32."""
    array = ids if isinstance(ids, np.ndarray) else np.array(ids, dtype=np.int64)
    raw = array.astype(_INT32, casting="same_kind", copy=False).tobytes()
    return common_pb2.TokenIds(ids_i32=raw, count=array.size)


def decode_ids(message: common_pb2.TokenIds, *, field: str) -> np.ndarray:
    """Token ids as a read-only int32 array. ``field`` is the message's path, for the error."""
    return _decode(message.ids_i32, message.count, _INT32, f"{field}.ids_i32")


def encode_floats(values: np.ndarray | Sequence[float]) -> common_pb2.TokenFloats:
    """One value per token as little-endian float32."""
    array = np.asarray(values, dtype=_FLOAT32)
    return common_pb2.TokenFloats(values_f32=array.tobytes(), count=array.size)


def decode_floats(message: common_pb2.TokenFloats, *, field: str) -> np.ndarray:
    """Values as a read-only float32 array. ``field`` is the message's path, for the error."""
    return _decode(message.values_f32, message.count, _FLOAT32, f"{field}.values_f32")


def _decode(raw: bytes, count: int, dtype: np.dtype, field: str) -> np.ndarray:
    if len(raw) != _BYTES_PER_VALUE * count:
        raise InvalidRequest(
            f"{field} holds {len(raw)} bytes but its count is {count}; "
            f"it must hold {_BYTES_PER_VALUE} bytes per value.",
            field=field,
        )
    return np.frombuffer(raw, dtype)
