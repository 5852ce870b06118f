"""Typed access to the fields of a record: text, conversations, responses.

Each function returns the value or raises a DataError with file, line and field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kleash.base.errors import DataError
from kleash.base.json_kinds import json_kind
from kleash.data.chat import ROLES, Message, Prompt
from kleash.data.jsonl import Record


def prompt(record: Record, field: str = "prompt") -> Prompt:
    """Text, or messages that end with the user."""
    value = required(record, field)
    if isinstance(value, str):
        return text(record, value, field)
    messages = conversation(record, value, field)
    if messages[-1]["role"] != "user":
        raise record.error(
            f"ends with role '{messages[-1]['role']}'; a prompt ends with role 'user'.", field
        )
    return messages


def response(record: Record, value: Any, field: str) -> str:
    """Text, or a list of one message of the assistant."""
    if isinstance(value, str):
        return text(record, value, field)
    messages = conversation(record, value, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise record.error(
            f"has the roles {roles}; a response is text or one message of role 'assistant'.", field
        )
    return messages[0]["content"]


def check_one_form(record: Record, prompt: Prompt, value: Any, field: str) -> None:
    """Raise when the prompt is text and the response a message: no template joins the two."""
    if isinstance(prompt, str) and isinstance(value, list):
        raise record.error(
            "is a message but the prompt is text; give both as text or both as messages.", field
        )


def conversation(record: Record, value: Any, field: str) -> list[Message]:
    """A list of messages with known roles and text; a system message comes first."""
    if not isinstance(value, list):
        raise record.error(f"must be text or a list of messages, not {json_kind(value)}.", field)
    if not value:
        raise record.error("has no messages.", field)
    messages = []
    for number, message in enumerate(value):
        where = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise record.error(
                f'must be a message {{"role", "content"}}, not {json_kind(message)}.', where
            )
        role = message.get("role")
        if role not in ROLES:
            raise record.error(
                f"unknown role {role!r}; the roles are {', '.join(ROLES)}.", f"{where}.role"
            )
        if role == "system" and number > 0:
            raise record.error("a system message comes first or not at all.", f"{where}.role")
        content = text(record, message.get("content"), f"{where}.content")
        messages.append(Message(role=role, content=content))
    return messages


def text(record: Record, value: Any, field: str) -> str:
    """Text that is not blank and can be written as UTF-8."""
    if not isinstance(value, str):
        raise record.error(f"must be text, not {json_kind(value)}.", field)
    if not value.strip():
        raise record.error("is empty.", field)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise record.error("has half of a surrogate pair, which is not text.", field) from None
    return value


def required(record: Record, field: str) -> Any:
    """The value of a field that must be there."""
    if field not in record.fields:
        names = ", ".join(f"'{name}'" for name in record.fields) or "no fields"
        raise record.error(f"is missing; the record has {names}.", field)
    return record.fields[field]


def label(record: Record, field: str) -> str:
    """A name given as text or as a whole number; empty without the field."""
    value = record.fields.get(field)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise record.error(f"must be text or a whole number, not {json_kind(value)}.", field)
    return str(value)


def margin(record: Record) -> float:
    """How much better the chosen response is, 0 without the field."""
    value = record.fields.get("margin", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise record.error(f"must be a number, not {json_kind(value)}.", "margin")
    if not math.isfinite(value) or value < 0:
        raise record.error(f"is {value}; it must be finite and not negative.", "margin")
    return float(value)


@contextmanager
def at(record: Record, field: str) -> Iterator[None]:
    """Add the record's place to a DataError that knows none."""
    try:
        yield
    except DataError as error:
        if error.path:
            raise
        raise record.error(str(error), field) from None


def check_length(
    record: Record, num_tokens: int, max_tokens: int, what: str, field: str = ""
) -> None:
    """Raise when ``what`` has more tokens than the limit."""
    if num_tokens > max_tokens:
        raise record.error(
            f"{what} has {num_tokens} tokens, more than the {max_tokens} that fit; "
            "shorten it, raise the limit or leave it out with --skip_bad=true.",
            field,
        )
