"""What kind a value of a JSON document is, in the words of error messages."""

from __future__ import annotations

from typing import Any

_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def json_kind(value: Any) -> str:
    """The kind of a value, "a list" for instance; the type's name of what JSON does not have."""
    return _NAMES.get(type(value), type(value).__name__)
