"""What ``kleash score`` reads: lines of text, or JSON objects, one at a time and in order.

A line is a text to score as it stands, or one of
    {"text": "..."}
    {"messages": [{"role": "user", "content": "..."}, ...]}
    {"prompt": TEXT OR MESSAGES, "response": "..."}
    {"prompt": TEXT OR MESSAGES, "responses": ["...", "...", ...]}     to be ranked
with an optional "id" (text or a number) that the result repeats; other fields are left alone. A
prompt that is text is one turn of the user.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from kleash.base.errors import ConfigError, DataError
from kleash.base.json_kinds import json_kind

MAX_LINE_BYTES = 64 * 1024 * 1024
"""More than the service takes of one input; a longer line is a bad one and is not kept."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Line:
    """One line of the input."""

    path: str
    number: int
    """The first one is 1."""
    raw: bytes
    """Without its end."""
    num_bytes: int
    """With its end, for the progress."""

    def error(self, message: str, field: str = "") -> DataError:
        """A DataError that names the place."""
        return DataError(message, path=self.path, line=self.number, field=field)

    def digest(self, settings: str) -> str:
        """Of the line and of what else its result depends on."""
        return hashlib.sha256(settings.encode() + b"\0" + self.raw).hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """One thing to score."""

    line: Line
    label: str | int | float | None
    """The "id" of the line."""
    given: str | Messages
    """A text, a conversation, or the prompt of a ranking."""
    responses: tuple[str, ...] = ()
    """Those to rank; empty for a text or conversation."""


Parse = Callable[[Line], Entry | None]
"""None for a blank line. Raises DataError."""


def read_lines(file: BinaryIO, path: str) -> Iterator[Line]:
    """Every line, blank ones included. A line above MAX_LINE_BYTES comes cut, one byte too long."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number, num_bytes = number + 1, len(raw)
        kept = raw
        while len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            raw = file.readline(MAX_LINE_BYTES + 1)
            num_bytes += len(raw)
        if number == 1:
            kept = kept.removeprefix(b"\xef\xbb\xbf")
        yield Line(path, number, kept.removesuffix(b"\n").removesuffix(b"\r"), num_bytes)


def parse_text(line: Line) -> Entry | None:
    """The line as it stands."""
    text = _decode(line)
    return Entry(line, None, text) if text.strip() else None


def parse_json(line: Line) -> Entry | None:
    """One JSON object of the kinds above."""
    text = _decode(line)
    if not text.strip():
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise line.error(f"is not valid JSON ({error}); write one object a line.") from None
    if not isinstance(fields, dict):
        raise line.error(f"is {json_kind(fields)}, not an object; write one object a line.")
    return _entry(line, fields)


def parse_cautiously(line: Line) -> Entry | None:
    """Text whose first line must not look like JSON Lines: their scores would mean nothing."""
    if line.number == 1 and line.raw.lstrip().startswith(b"{"):
        try:
            is_object = isinstance(json.loads(line.raw), dict)
        except (ValueError, RecursionError):
            is_object = False
        if is_object:
            raise ConfigError(
                f"the first line of {line.path} is a JSON object; say --format=jsonl, or "
                "--format=text to score the lines as they stand."
            )
    return parse_text(line)


PARSERS: dict[str, Parse] = {"auto": parse_cautiously, "text": parse_text, "jsonl": parse_json}


def _decode(line: Line) -> str:
    if len(line.raw) > MAX_LINE_BYTES:
        raise line.error(f"has more than {MAX_LINE_BYTES} bytes; shorten it.")
    try:
        return line.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise line.error(f"is not UTF-8: {error.reason}.") from None


def _entry(line: Line, fields: Mapping[str, Any]) -> Entry:
    kinds = [name for name in ("text", "messages", "response", "responses") if name in fields]
    if len(kinds) != 1:
        names = ", ".join(f"'{name}'" for name in kinds or fields) or "no fields"
        raise line.error(
            "a line has one of 'text', 'messages', 'prompt' with 'response', and 'prompt' with "
            f"'responses'; this one has {names}."
        )
    label = fields.get("id")
    if isinstance(label, bool) or not isinstance(label, str | int | float | None):
        raise line.error(f"must be text or a number, not {json_kind(label)}.", "id")
    match kinds[0]:
        case "text":
            return Entry(line, label, _text(line, fields["text"], "text"))
        case "messages":
            return Entry(line, label, _messages(line, fields["messages"], "messages"))
        case "response":
            response = _text(line, fields["response"], "response")
            turn = {"role": "assistant", "content": response}
            return Entry(line, label, [*_prompt(line, fields), turn])
    return Entry(line, label, _prompt(line, fields), _responses(line, fields["responses"]))


def _prompt(line: Line, fields: Mapping[str, Any]) -> Messages:
    if "prompt" not in fields:
        raise line.error("is missing; a response is scored after its prompt.", "prompt")
    value = fields["prompt"]
    if isinstance(value, str):
        return [{"role": "user", "content": _text(line, value, "prompt")}]
    return _messages(line, value, "prompt")


def _responses(line: Line, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        seen = f"{len(value)}" if isinstance(value, list) else json_kind(value)
        raise line.error(f"must be a list of at least two texts, not {seen}.", "responses")
    return tuple(_text(line, each, f"responses[{n}]") for n, each in enumerate(value))


def _messages(line: Line, value: Any, field: str) -> Messages:
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else json_kind(value)
        raise line.error(f"must be a list of messages, not {kind}.", field)
    messages = []
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, dict):
            raise line.error(
                f'must be a message {{"role", "content"}}, not {json_kind(message)}.', place
            )
        messages.append(
            {key: _text(line, message.get(key), f"{place}.{key}") for key in ("role", "content")}
        )
    return messages


def _text(line: Line, value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise line.error(f"must be text, not {json_kind(value)}.", field)
    if not value:
        raise line.error("is empty.", field)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise line.error("has half of a surrogate pair, which is not text.", field) from None
    return value
