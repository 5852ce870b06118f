"""How many fields a request holds, before it is parsed.

Parsing takes the event loop, and for each field of a message memory that its two bytes do not show:
a request within the limit of bytes may hold thirty million empty messages. So a large one is
counted first, in a thread, by a scan that stops at the limit.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from kleash.rpc.errors import InvalidRequest
from kleash.rpc.requests import TOO_LARGE

LARGE_BYTES = 1 << 21
"""Less is parsed in some sixty milliseconds, whatever it holds."""
MAX_FIELDS = 1 << 19
"""In one message: a thousand items of a hundred turns have 300 000. They are parsed in some thirty
milliseconds, beside what the bytes of texts take."""
# Deeper ones are refused by the parser, too.
MAX_DEPTH = 100

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BITS = 70
_FIXED = {_FIXED64: 8, _FIXED32: 4}


def is_large(raw: bytes) -> bool:
    """Whether a message must be counted before it is parsed."""
    return len(raw) > LARGE_BYTES


def check_fields(raw: bytes, descriptor: Descriptor, max_fields: int = MAX_FIELDS) -> None:
    """Raise InvalidRequest for more fields than a request may have.

    Bytes that are no message pass: the parser says what is wrong with them.
    """
    try:
        count = _count(raw, descriptor, max_fields)
    except (IndexError, _NotAMessageError):
        return
    if count > max_fields:
        raise InvalidRequest(
            f"the request holds more than {max_fields} fields; send fewer items in one request.",
            reason=TOO_LARGE,
        )


def _count(raw: bytes, descriptor: Descriptor, max_fields: int) -> int:
    """Fields in a message and in those within it; more than ``max_fields`` are not counted on."""
    count = 0
    pending: list[tuple[int, int, dict[int, Any], int]] = [
        (0, len(raw), _messages(descriptor), MAX_DEPTH)
    ]
    known: dict[str, dict[int, Any]] = {}
    while pending and count <= max_fields:
        place, end, messages, depth = pending.pop()
        while place < end:
            count += 1
            if count > max_fields:
                break
            tag, place = _varint(raw, place)
            kind = tag & 7
            if kind == _VARINT:
                _, place = _varint(raw, place)
            elif kind == _BYTES:
                length, place = _varint(raw, place)
                inner = messages.get(tag >> 3)
                if inner is not None and length and depth:
                    if inner.full_name not in known:
                        known[inner.full_name] = _messages(inner)
                    stop = min(place + length, end)
                    pending.append((place, stop, known[inner.full_name], depth - 1))
                place += length
            else:
                place += _FIXED.get(kind, 0)  # 0: begin and end of a group
    return count


def _messages(descriptor: Descriptor) -> dict[int, Descriptor]:
    """Types of the fields that are messages, by number."""
    return {
        field.number: field.message_type
        for field in descriptor.fields
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None
    }


def _varint(raw: bytes, place: int) -> tuple[int, int]:
    """A number and the place behind it."""
    byte = raw[place]
    if byte < 0x80:
        return byte, place + 1
    value, shift = byte & 0x7F, 7
    while True:
        place += 1
        byte = raw[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place + 1
        shift += 7
        if shift > _MAX_VARINT_BITS:
            raise _NotAMessageError


class _NotAMessageError(Exception):
    """The bytes are no message."""
