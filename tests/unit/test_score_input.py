"""The lines that ``kleash score`` reads: what each kind means, and what is said of a bad one."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from kleash.base.errors import ConfigError, DataError
from kleash.cli import score_input
from kleash.cli.score_flags import parse_flags
from kleash.cli.score_input import PARSERS, Entry, Line, read_lines

pytestmark = pytest.mark.unit

TURN = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def line(raw: bytes, number: int = 7) -> Line:
    return Line("data.jsonl", number, raw, len(raw))


def parsed(value: Any) -> Entry:
    entry = PARSERS["jsonl"](line(json.dumps(value).encode()))
    assert entry is not None
    return entry


@pytest.mark.parametrize(
    ("value", "given", "responses"),
    [
        ({"text": " verbatim<|end|>"}, " verbatim<|end|>", ()),
        ({"messages": [TURN, ANSWER]}, [TURN, ANSWER], ()),
        ({"prompt": "q", "response": "a"}, [TURN, ANSWER], ()),
        ({"prompt": [TURN, ANSWER, TURN], "response": "a"}, [TURN, ANSWER, TURN, ANSWER], ()),
        ({"prompt": "q", "responses": ["a", "b"]}, [TURN], ("a", "b")),
        ({"prompt": [TURN], "responses": ["a", "b"], "source": 5}, [TURN], ("a", "b")),
    ],
)
def test_each_kind_of_object(value: Any, given: Any, responses: tuple[str, ...]) -> None:
    entry = parsed(value)
    assert (entry.given, entry.responses, entry.label) == (given, responses, None)
    assert parsed(value | {"id": "x-1"}).label == "x-1"
    assert parsed(value | {"id": 12}).label == 12


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({}, "this one has no fields"),
        ({"body": "x"}, "this one has 'body'"),
        ({"text": "x", "messages": [TURN]}, "this one has 'text', 'messages'"),
        ({"text": 5}, "field 'text': must be text, not a number"),
        ({"text": ""}, "field 'text': is empty"),
        ({"text": "\ud800"}, "field 'text': has half of a surrogate pair"),
        ({"text": "x", "id": [1]}, "field 'id': must be text or a number, not a list"),
        ({"text": "x", "id": True}, "field 'id': must be text or a number, not true or false"),
        ({"response": "x"}, "field 'prompt': is missing"),
        ({"prompt": None, "response": "x"}, "field 'prompt': must be a list of messages, not null"),
        ({"prompt": [], "response": "x"}, "field 'prompt': must be a list of messages, not an em"),
        ({"prompt": "q", "responses": ["a"]}, "field 'responses': must be a list of at least two"),
        ({"prompt": "q", "responses": "ab"}, "field 'responses': must be a list .* not text"),
        ({"prompt": "q", "responses": ["a", 1]}, r"field 'responses\[1\]': must be text"),
        ({"messages": [TURN, "a"]}, r"field 'messages\[1\]': must be a message"),
        (
            {"messages": [{"role": "user"}]},
            r"field 'messages\[0\].content': must be text, not null",
        ),
        ([1], "is a list, not an object"),
    ],
)
def test_a_bad_object_names_file_line_and_field(value: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.jsonl:7: .*{sentence}"):
        parsed(value)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b'{"text": ', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"text": "\xff"}', "is not UTF-8"),
    ],
)
def test_what_is_no_json_is_said(raw: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"^data\.jsonl:7: {sentence}"):
        PARSERS["jsonl"](line(raw))


def test_lines_keep_their_numbers_and_lose_their_ends() -> None:
    file = io.BytesIO(b"\xef\xbb\xbfone\r\n\n  \nfour \nfive")
    lines = list(read_lines(file, "in"))
    assert [(each.number, each.raw) for each in lines] == [
        (1, b"one"), (2, b""), (3, b"  "), (4, b"four "), (5, b"five"),
    ]  # fmt: skip
    assert sum(each.num_bytes for each in lines) == len(file.getvalue())
    entries = [PARSERS["text"](each) for each in lines]
    assert [each and each.given for each in entries] == ["one", None, None, "four ", "five"]
    assert PARSERS["jsonl"](lines[2]) is None


def test_a_line_without_end_is_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_input, "MAX_LINE_BYTES", 100)
    file = io.BytesIO(b"x" * 100 + b"\n" + b"y" * 1000 + b"\n" + b"z" * 99 + b"\n")
    lines = list(read_lines(file, "in"))
    assert [each.number for each in lines] == [1, 2, 3]
    assert max(len(each.raw) for each in lines) == 101
    assert PARSERS["text"](lines[0]) is not None
    assert PARSERS["text"](lines[2]) is not None
    with pytest.raises(DataError, match=r"^in:2: has more than 100 bytes"):
        PARSERS["text"](lines[1])
    assert sum(each.num_bytes for each in lines) == len(file.getvalue())


def test_json_lines_are_not_scored_as_text_by_mistake() -> None:
    first = line(b'{"text": "x"}', 1)
    with pytest.raises(ConfigError, match="say --format=jsonl, or --format=text"):
        PARSERS["auto"](first)
    entry = PARSERS["text"](first)
    assert entry is not None
    assert entry.given == '{"text": "x"}'
    assert PARSERS["auto"](line(b"{not json", 1)) is not None
    assert PARSERS["auto"](line(b'{"text": "x"}', 2)) is not None


def test_a_digest_is_of_the_line_and_the_settings() -> None:
    digests = {
        line(raw, number).digest(settings)
        for raw in (b"a", b"b")
        for settings in ("x", "y")
        for number in (1, 2)
    }
    assert len(digests) == 4


def test_flags_take_dashes_and_booleans_as_every_command_does() -> None:
    flags = parse_flags(["in.txt", "--skip-bad", "--out=o", "--resume=true", "--normalize=false"])
    assert flags is not None
    assert (flags.skip_bad, flags.resume, flags.normalize) == (True, True, False)
    flags = parse_flags(["--skip_bad", "in.jsonl", "--timeout-s", "3"])
    assert flags is not None
    assert (flags.format, flags.timeout_s, flags.resume) == ("jsonl", 3.0, False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--resume", "in"], "name it with --out=FILE"),
        (["in", "--text=x"], "give --text or the file in, not both"),
        (["--parallel=0"], "--parallel=0 is not between 1 and 256"),
        (["--timeout_s=-1"], "--timeout_s=-1 is not a number of seconds above 0"),
        (["--timeout_s=inf"], "--timeout_s=inf is not"),
        (["--truncation=middle"], "invalid choice: 'middle'"),
        (["--skip_bad=maybe"], "'maybe' is neither true nor false"),
        (["--adress=x"], "unrecognized arguments: --adress=x"),
    ],
)
def test_flags_that_cannot_be_used(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_flags(arguments)
