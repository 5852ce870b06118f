"""Messages of any type, half sensible and half not, from a source of numbers.

A source is random.Random for speed, hypothesis for small counterexamples, or atheris for coverage.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

Source = Callable[[int, int], int]
"""A number between two, both included."""

ODD_TEXTS = (
    "",
    "\0",
    "\n\r\u2028\x1b[31m",
    "\ufeff\u202e\U0001f9a5e\u0301",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "{{ messages }}{% raise %}",
    "../../etc/passwd",
    "%s%n{0}{x}",
)
ODD_NUMBERS = (0, 1, 2, 3, 4, 127, 128, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
ODD_FLOATS = (0.0, -0.0, 1.0, float("nan"), float("inf"), float("-inf"), 3.4e38, 1e-45)
MAX_DEPTH = 6


def numbers_of(generator: random.Random) -> Source:
    """Random numbers."""
    return generator.randint


def build(make: type[M], source: Source, hints: Mapping[str, Sequence[Any]]) -> M:
    """A message; ``hints`` are good values of fields by name, taken half of the time."""
    message = make()
    _fill(message, source, hints, MAX_DEPTH)
    return message


def _fill(message: Message, source: Source, hints: Mapping[str, Sequence[Any]], depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        if source(0, 3) == 0:
            continue
        if field.is_repeated:
            for _ in range(_length(source)):
                _add(getattr(message, field.name), field, source, hints, depth)
        elif field.message_type is not None:
            if depth:
                inner = getattr(message, field.name)
                inner.SetInParent()
                _fill(inner, source, hints, depth - 1)
        else:
            setattr(message, field.name, _value(field, source, hints))
    if message.DESCRIPTOR.full_name == "kleash.common.v1.TokenIds" and source(0, 7):
        message.count = len(message.ids_i32) // 4  # type: ignore[attr-defined]


def _add(
    values: Any, field: Any, source: Source, hints: Mapping[str, Sequence[Any]], depth: int
) -> None:
    if field.message_type is None:
        values.append(_value(field, source, hints))
    elif depth:
        _fill(values.add(), source, hints, depth - 1)


def _length(source: Source) -> int:
    return (0, 1, 2, 3, 5, 9)[source(0, 5)]


def _value(field: Any, source: Source, hints: Mapping[str, Sequence[Any]]) -> Any:
    good = hints.get(field.name)
    if good and source(0, 7):
        return good[source(0, len(good) - 1)]
    match field.type:
        case Field.TYPE_STRING:
            return _text(source)
        case Field.TYPE_BYTES:
            return _ids(source)
        case Field.TYPE_BOOL:
            return bool(source(0, 1))
        case Field.TYPE_ENUM:
            return (*range(6), 99, -1, 2**31 - 1)[source(0, 8)]
        case Field.TYPE_FLOAT | Field.TYPE_DOUBLE:
            return ODD_FLOATS[source(0, len(ODD_FLOATS) - 1)]
        case Field.TYPE_UINT32 | Field.TYPE_UINT64:
            number = ODD_NUMBERS[source(0, len(ODD_NUMBERS) - 1)]
            return number & (2**32 - 1 if field.type == Field.TYPE_UINT32 else 2**64 - 1)
        case _:
            return source(-(2**31), 2**31 - 1)


def _text(source: Source) -> str:
    parts = []
    for _ in range(source(0, 4)):
        if source(0, 2) == 0:
            parts.append(ODD_TEXTS[source(0, len(ODD_TEXTS) - 1)])
        elif source(0, 9) == 0:
            parts.append(chr(source(32, 0xD7FF)) * source(1, 600))
        else:
            parts.append(chr(source(0, 0xD7FF)) + " 3 plus 4"[: source(0, 9)])
    return "".join(parts)


def _ids(source: Source) -> bytes:
    """Token ids, most of them of a small vocabulary, at times not whole."""
    count = _length(source) * source(1, 30)
    ids = [source(0, 60) if source(0, 40) else source(-(2**31), 2**31 - 1) for _ in range(count)]
    raw = struct.pack(f"<{count}i", *ids)
    return raw if source(0, 9) else raw[: source(0, len(raw))]


def spoiled(raw: bytes, source: Source) -> bytes:
    """``raw`` with some bytes changed, cut off or put in."""
    data = bytearray(raw)
    for _ in range(source(1, 4)):
        place = source(0, max(len(data) - 1, 0))
        match source(0, 2):
            case 0 if data:
                data[place] = source(0, 255)
            case 1:
                del data[place : place + source(1, 8)]
            case _:
                data[place:place] = bytes(source(0, 255) for _ in range(source(1, 8)))
    return bytes(data)
