"""Messages to and from JSON, as protobuf's JSON mapping has it.

Names are read in both spellings, item_id and itemId, and written in the first. Bytes are base64,
64-bit integers are strings, every field without a message of its own is written even when zero.
What cannot be read is refused with the path of the field: that is why ``read_message`` is here, and
json_format is not asked. A body is counted before it is parsed, as a large message of gRPC is.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from kleash.rpc.errors import InternalError, InvalidRequest
from kleash.rpc.requests import TOO_LARGE
from kleash.rpc.wire import MAX_FIELDS

MAX_DEPTH = 32
"""Objects and lists within one another. Of the requests that there are, six are enough."""
MAX_PATH = 256
BAD_JSON, UNKNOWN_FIELD, WRONG_TYPE = "BAD_JSON", "UNKNOWN_FIELD", "WRONG_TYPE"

# A string to its end or the body's, or what opens, closes or separates values.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_MAX_DIGITS = 40
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)", re.ASCII)
# A larger number is infinite once it is in its field; up to half a step more rounds down.
_HIGHEST = {
    FieldDescriptor.CPPTYPE_FLOAT: math.nextafter(float.fromhex("0x1.ffffffp+127"), 0.0),
    FieldDescriptor.CPPTYPE_DOUBLE: sys.float_info.max,
}

M = TypeVar("M", bound=Message)


def parse_json(raw: bytes) -> Any:
    """The value that a body holds. Raises InvalidRequest: no JSON, too deep, too many values."""
    _check_shape(raw)
    try:
        return json.loads(
            raw.decode("utf-8"),
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_doubles,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the body is not UTF-8 at byte {error.start}.", reason=BAD_JSON
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
            reason=BAD_JSON,
        ) from None
    except ValueError:  # Python reads no number of more than 4300 digits
        raise InvalidRequest(
            "the body holds a number with too many digits.", reason=BAD_JSON
        ) from (None)


def read_message(make: type[M], value: Any) -> M:
    """The message that a JSON value stands for. Raises InvalidRequest with the field's path."""
    message = make()
    _fill(message, value, "")
    return message


def read_query(make: type[M], query: Mapping[str, str]) -> M:
    """The message whose fields, all texts, are in the query of an address."""
    return read_message(make, dict(query))


def write_message(message: Message) -> Any:
    """The JSON value of a message."""
    _check_finite(message)
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def dump_json(value: Any) -> bytes:
    """A JSON value as the bytes of one line."""
    # A sentence about a name with half a letter in it cannot be encoded.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode(errors="replace")


def _check_shape(raw: bytes) -> None:
    """Raise InvalidRequest for what costs too much to parse."""
    depth, count = 0, 0
    for token in _TOKEN.finditer(raw):
        byte = raw[token.start()]
        if byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise InvalidRequest(
                    f"the body nests objects and lists deeper than {MAX_DEPTH} levels.",
                    reason=BAD_JSON,
                )
        elif byte in b"]}":
            depth -= 1
        if byte != ord('"'):
            count += 1
            if count > 2 * MAX_FIELDS:  # a bracket each at both ends of a value
                raise InvalidRequest(
                    f"the body holds more than {MAX_FIELDS} values; send fewer items in one "
                    "request.",
                    reason=TOO_LARGE,
                )


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"the body holds {name}, which is not JSON.", reason=BAD_JSON)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise InvalidRequest(f"an object of the body has {_quoted(double)} twice.", reason=BAD_JSON)
    return found


def _fill(message: Message, value: Any, path: str) -> None:
    if not isinstance(value, dict):
        _refuse_type(path or "the body", path, "an object", value)
    fields = _fields(message.DESCRIPTOR)
    seen: set[str] = set()
    for name, inner in value.items():
        place = f"{path}.{name}" if path else name
        field = fields.get(name)
        if field is None:
            _refuse_name(name, path, message.DESCRIPTOR)
        if inner is None:
            continue
        clash = next((each for each in _exclusive(field) if each in seen), None)
        if clash is not None:
            raise InvalidRequest(
                f"{place} and {clash} exclude each other; set one.", field=place, reason=WRONG_TYPE
            )
        seen.add(field.name)
        if field.is_repeated:
            _fill_list(getattr(message, field.name), field, inner, place)
        elif field.message_type is not None:
            its = getattr(message, field.name)
            its.SetInParent()
            _fill(its, inner, place)
        else:
            setattr(message, field.name, _scalar(field, inner, place))


def _fill_list(values: Any, field: FieldDescriptor, value: Any, path: str) -> None:
    if not isinstance(value, list):
        _refuse_type(path, path, "a list", value)
    for index, inner in enumerate(value):
        place = f"{path}[{index}]"
        if field.message_type is not None:
            _fill(values.add(), inner, place)
        else:
            values.append(_scalar(field, inner, place))


def _scalar(field: FieldDescriptor, value: Any, path: str) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return value if isinstance(value, bool) else _refuse_type(path, path, "a boolean", value)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if not isinstance(value, str):
            _refuse_type(path, path, "a string", value)
        return (
            _bytes(value, path) if field.type == FieldDescriptor.TYPE_BYTES else _text(value, path)
        )
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return _enum(field, value, path)
    if kind in _HIGHEST:
        return _float(value, path, _HIGHEST[kind])
    return _integer(value, path, *_RANGES[kind])


def _text(value: str, path: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{path} holds half of a surrogate pair, which is no letter.",
            field=path,
            reason=WRONG_TYPE,
        ) from None
    return value


def _bytes(value: str, path: str) -> bytes:
    plain = value.translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{path} is not base64.", field=path, reason=WRONG_TYPE) from None


def _enum(field: FieldDescriptor, value: Any, path: str) -> int:
    assert field.enum_type is not None
    names = _numbers(field.enum_type)
    if isinstance(value, str) and value in names:
        return names[value]
    if isinstance(value, int) and not isinstance(value, bool):
        return _integer(value, path, *_RANGES[FieldDescriptor.CPPTYPE_INT32])
    return _refuse_type(path, path, f"one of {', '.join(names)}", value)


@functools.cache
def _numbers(enum: EnumDescriptor) -> dict[str, int]:
    """By name. The descriptor's own mapping cannot be asked for half of a surrogate pair."""
    return {value.name: value.number for value in enum.values}


def _integer(value: Any, path: str, lowest: int, highest: int) -> int:
    if isinstance(value, str) and len(value) <= _MAX_DIGITS and _INTEGER.fullmatch(value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        _refuse_type(path, path, f"an integer from {lowest} to {highest}", value)
    return value


def _float(value: Any, path: str, highest: float) -> float:
    """A finite one: the mapping's "NaN" and "Infinity" are refused."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not -highest <= value <= highest
    ):
        _refuse_type(path, path, f"a finite number of at most {highest:g}", value)
    return float(value)


@functools.cache
def _fields(descriptor: Descriptor) -> dict[str, FieldDescriptor]:
    """By both spellings."""
    by_camel = {field.camelcase_name: field for field in descriptor.fields}
    return by_camel | {field.name: field for field in descriptor.fields}


def _exclusive(field: FieldDescriptor) -> list[str]:
    """Fields beside which this one cannot be set: itself, and those of its oneof."""
    oneof = field.containing_oneof
    return [field.name] if oneof is None else [each.name for each in oneof.fields]


def _refuse_name(name: str, path: str, descriptor: Any) -> NoReturn:
    known = ", ".join(field.name for field in descriptor.fields) or "none"
    raise InvalidRequest(
        f"{path or 'the request'} has no field {_quoted(name)}; its fields: {known}.",
        field=(f"{path}.{name}" if path else name)[:MAX_PATH],
        reason=UNKNOWN_FIELD,
    )


def _refuse_type(name: str, path: str, wanted: str, value: Any) -> NoReturn:
    raise InvalidRequest(
        f"{name} is {_described(value)}; it must be {wanted}.", field=path, reason=WRONG_TYPE
    )


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return _quoted(value)


def _quoted(value: Any) -> str:
    """A scalar as JSON, cut."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "an integer of many digits"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number too large"
    if isinstance(value, str) and len(value) > 60:
        return json.dumps(value[:60] + "...")
    return json.dumps(value)


def _check_finite(message: Message) -> None:
    """Raise InternalError for NaN and infinity, which JSON does not have."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else (value,):
                _check_finite(inner)
        elif field.cpp_type in _HIGHEST and not all(
            map(math.isfinite, value if field.is_repeated else (value,))
        ):
            raise InternalError(f"{field.full_name} of the answer is not finite.")
